"""Files that appear whole or not at all, whatever interrupts their writing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors

__all__ = ["check_place", "replaced"]


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, before anything is computed for it.

    Raises:
        OSError: Says what is wrong with it.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: the folder {path.parent} is not writable")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a place beside a file to write to, and move what is there to the file in the end.

    Raises:
        OSError: If nothing can be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        # Texts of the formats' libraries name the partial file, or one of their own.
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error).split(" at path")[0]
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
