"""What the documentation shows is so: README's Python blocks, examples in docstrings, links."""

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.test_layout import ROOT, library_files, module_name

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_EXECUTED = re.compile(r"<!-- not executed: \S[^>]* -->\s*\Z")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


class Block(NamedTuple):
    """A piece of Python shown in a document, and the line it starts at."""

    source: str
    line: int


def python_blocks(text: str) -> list[Block]:
    """Python blocks of a Markdown text, less those that a comment exempts with a reason."""
    return [
        Block(match[2], text[: match.start(2)].count("\n"))
        for match in FENCE.finditer(text)
        if match[1] == "python" and not NOT_EXECUTED.search(text[: match.start()])
    ]


@pytest.fixture
def as_a_reader_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Run in an empty folder, with torch's own default dtype and a random state to spend."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(torch.float64)


def test_reader_of_blocks() -> None:
    text = (
        "a\n```python\nx = 1\n```\n```sh\nls\n```\n<!-- not executed: slow -->\n```python\n!\n```\n"
    )
    assert python_blocks(text) == [Block("x = 1\n", 2)]


@pytest.mark.slow
# README's chains are short, so that it runs in a minute; NUTS rightly says so.
@pytest.mark.filterwarnings("ignore:NUTS")
def test_readme_runs(as_a_reader_runs_it: None) -> None:
    namespace = {"__name__": "readme"}
    for block in python_blocks((ROOT / "README.md").read_text()):
        # The empty lines make a traceback name README's own line.
        exec(compile("\n" * block.line + block.source, ROOT / "README.md", "exec"), namespace)


@pytest.mark.parametrize("name", [module_name(p) for p in library_files() if p.stem != "__main__"])
def test_examples_in_docstrings_run(name: str, as_a_reader_runs_it: None) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not doctest.testmod(importlib.import_module(name), optionflags=flags).failed


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    targets = LINK.findall((ROOT / name).read_text())
    assert not [target for target in targets if not (ROOT / target).exists()]
