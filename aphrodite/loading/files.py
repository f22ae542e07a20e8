"""Opening checkpoint files."""

from __future__ import annotations

import mmap
from pathlib import Path

from aphrodite.errors import ModelFormatError

MAX_JSON_BYTES = 64 << 20


def map_file(path: Path) -> mmap.mmap:
    """The whole file as a read-only memory map.

    Raises:
        ModelFormatError: the file is missing, unreadable or empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # mmap's word for an empty file
        raise ModelFormatError(f"cannot read {path}: the file is empty; download it again") from None
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None


def read_small_file(path: Path) -> bytes:
    """A configuration file's bytes, refused above 64 MiB.

    Raises:
        ModelFormatError: the file is missing, unreadable or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_JSON_BYTES:
        raise ModelFormatError(f"cannot read {path}: it is larger than {MAX_JSON_BYTES >> 20} MiB")
    return data
