"""The layout holds: folders, links, arrows between packages, lazy loading, names, docstrings."""

import ast
import fnmatch
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bayesattn

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {
    ".ci",
    ".git",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "bayesattn",
    "constraints.txt",
    "examples",
    "inference",
    "models",
    "pyproject.toml",
    "tests",
}
FORBIDDEN = {
    "bayesattn": ("bayesattn.inference", "bayesattn.models", "pyro"),
    "models": ("bayesattn.inference", "bayesattn.networks"),
    "inference": ("bayesattn.models",),
}
DOORS = {ROOT / "bayesattn/__init__.py", ROOT / "bayesattn/__main__.py"}
NAMES_THAT_HOLD_ANYTHING = {"utils", "util", "helpers", "common", "misc"}


def package_files(folder: str) -> list[Path]:
    """Python files of a top-level folder, not following its links."""
    walk = os.walk(ROOT / folder, followlinks=False)
    return sorted(Path(at, n) for at, _, names in walk for n in names if n.endswith(".py"))


def library_files() -> list[Path]:
    return [path for folder in FORBIDDEN for path in package_files(folder)]


def module_name(path: Path) -> str:
    """Dotted import name of a file of the library."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "bayesattn" else ("bayesattn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a syntax tree imports when it runs; type-checking blocks do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported_names(ast.Module([other], []))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        else:
            yield from imported_names(node)


def wrong_imports(source: str, forbidden: tuple[str, ...]) -> list[str]:
    """Imports that are relative, forbidden, or of the lazy door, which leads anywhere."""
    return [
        name
        for name in imported_names(ast.parse(source))
        if name.startswith((".", "__future__."))
        or name == "bayesattn"
        or any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import bayesattn.models", ["bayesattn.models"]),
        ("from bayesattn import inference", ["bayesattn.inference"]),
        ("from bayesattn.inference.svgd import SVGD", ["bayesattn.inference.svgd.SVGD"]),
        ("def f():\n    import pyro.infer", ["pyro.infer"]),
        ("from . import kernels", ["..kernels"]),
        ("from __future__ import annotations", ["__future__.annotations"]),
        ("import bayesattn as ba", ["bayesattn"]),
        ("if TYPE_CHECKING:\n    import pyro\nelse:\n    import pyro.poutine", ["pyro.poutine"]),
        ("import pyroclast\nfrom bayesattn.kernels import RBF", []),
    ],
)
def test_reader_of_imports(source: str, wrong: list[str]) -> None:
    assert wrong_imports(source, FORBIDDEN["bayesattn"]) == wrong


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder: str) -> None:
    files = [path for path in package_files(folder) if path not in DOORS]
    found = {p.name: wrong_imports(p.read_text(), FORBIDDEN[folder]) for p in files}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_listed_packages_are_those_on_disk() -> None:
    folders = {path.parent for path in library_files() if path.name == "__init__.py"}
    listed = PYPROJECT["tool"]["setuptools"]
    on_disk = {module_name(folder / "__init__.py"): folder for folder in folders}
    assert sorted(listed["packages"]) == sorted(on_disk)
    mapped = {name: ROOT / folder for name, folder in listed["package-dir"].items()}
    assert mapped == on_disk


def test_data_files_are_packaged() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        files = [p for p in (ROOT / folder).iterdir() if p.is_file() and p.suffix != ".py"]
        wanted = [pattern.removeprefix("**/") for pattern in patterns.get(name, [])]
        missing += [p for p in files if not any(fnmatch.fnmatch(p.name, w) for w in wanted)]
    assert not missing


@pytest.mark.parametrize("name", ["inference", "models"])
def test_links(name: str) -> None:
    link = ROOT / "bayesattn" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_top_level_holds_nothing_else() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {path.name for path in ROOT.iterdir()}
    kept = {n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)}
    assert kept <= TOP_LEVEL


def test_no_module_is_named_for_holding_anything() -> None:
    assert not [path for path in library_files() if path.stem in NAMES_THAT_HOLD_ANYTHING]


def test_no_public_name_equals_its_module() -> None:
    clashes = []
    for path in library_files():
        nodes = ast.parse(path.read_text()).body
        defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        clashes += [path] if path.stem in defined else []
    assert not clashes


@pytest.mark.parametrize("name", PYPROJECT["tool"]["setuptools"]["packages"][1:])
def test_no_exported_name_hides_a_module(name: str) -> None:
    package = importlib.import_module(name)
    modules = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")}
    assert not modules & set(package.__all__)
    assert all(hasattr(package, exported) for exported in package.__all__)


def test_every_file_starts_with_a_docstring() -> None:
    files = [*library_files(), *package_files("tests"), *package_files("examples")]
    assert not [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))]


def test_lazy_names_are_the_typed_ones_and_resolve() -> None:
    tree = ast.parse((ROOT / "bayesattn/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body[:-1] for alias in node.names}  # type: ignore[attr-defined]
    assert typed | {"__version__"} == set(bayesattn.__all__) == set(dir(bayesattn))
    assert all(getattr(bayesattn, name) is not None for name in bayesattn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bayesattn.nothing  # noqa: B018


def in_fresh_process(program: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", program]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_import_is_light() -> None:
    done = in_fresh_process("import sys, bayesattn; print({'pyro', 'torch'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_floor_below_loads_neither_pyro_nor_foreign_networks() -> None:
    names = [module_name(p) for p in package_files("bayesattn") if p.stem != "__main__"]
    heavy = "{'pyro', 'transformers'} & set(sys.modules)"
    done = in_fresh_process(f"import sys, {', '.join(names)}; print({heavy})")
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", ["inference", "models"])
def test_second_copy_is_refused(name: str) -> None:
    done = in_fresh_process(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: import bayesattn.{name}, not {name}" in done.stderr
