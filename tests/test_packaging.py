"""The wheel and the sdist hold the whole library and nothing beside it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tests.test_layout import PYPROJECT, ROOT

pytestmark = pytest.mark.slow

VERSION = PYPROJECT["project"]["version"]
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def library_on_disk() -> set[Path]:
    """Files of the library, relative to the root, caches left out."""
    files = {path for folder in FOLDERS.values() for path in (ROOT / folder).iterdir()}
    return {path.relative_to(ROOT) for path in files if path.is_file()}


def import_path(path: Path) -> Path:
    """Where a file of the library stands once it is installed."""
    return path if path.parts[0] == "bayesattn" else "bayesattn" / path


def test_wheel(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names} == {"bayesattn", f"bayesattn-{VERSION}.dist-info"}
    shipped = {Path(name) for name in names if name.parts[0] == "bayesattn"}
    assert shipped == {import_path(path) for path in library_on_disk()}


def test_sdist(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {PurePosixPath(name) for name in archive.getnames()}
    shipped = {Path(name.relative_to(f"bayesattn-{VERSION}")) for name in names}
    wanted = {Path("LICENSE"), Path("README.md"), Path("pyproject.toml"), *library_on_disk()}
    assert not wanted - shipped
