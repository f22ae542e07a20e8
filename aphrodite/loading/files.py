"""Opening checkpoint files."""

from __future__ import annotations

import mmap
from pathlib import Path

from aphrodite.errors import ModelFormatError

MAX_JSON_BYTES = 64 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def map_file(path: Path) -> mmap.mmap:
    """The whole file as a read-only memory map.

    Raises:
        ModelFormatError: the file is missing, unreadable, empty or only a pointer to itself.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # mmap's word for an empty file
        raise ModelFormatError(f"cannot read {path}: the file is empty; download it again") from None
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    _check_contents(path, mapped[: len(_POINTER)])
    return mapped


def _check_contents(path: Path, start: bytes) -> None:
    """
    Raises:
        ModelFormatError: the file is what a clone without Git LFS leaves in the place of a large one.
    """
    if start == _POINTER:
        raise ModelFormatError(
            f"cannot read {path}: it is a Git LFS pointer, not the file itself; run git lfs pull in its folder, "
            "or download the file"
        )


def read_small_file(path: Path) -> bytes:
    """A configuration file's bytes, refused above 64 MiB.

    Raises:
        ModelFormatError: the file is missing, unreadable, too large or only a pointer to itself.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_JSON_BYTES:
        raise ModelFormatError(f"cannot read {path}: it is larger than {MAX_JSON_BYTES >> 20} MiB")
    _check_contents(path, data[: len(_POINTER)])
    return data
