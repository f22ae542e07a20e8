"""One way to a checkpoint's tokenizer, whatever its format."""

from __future__ import annotations

from pathlib import Path

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.directory import load_directory
from aphrodite.tokenizer.gguf import load_gguf
from aphrodite.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: a GGUF file, a directory with one of the files that `tokenizer/directory.py` knows, or one of these.

    Raises:
        ModelFormatError: there is no tokenizer, it is damaged, or its kind is not supported.
    """
    if path.is_dir():
        return load_directory(path)
    if not path.is_file():
        raise ModelFormatError(f"{path}: there is no such file or directory to read a tokenizer from")
    if path.suffix in (".json", ".model"):
        return load_directory(path.parent, path)
    return load_gguf(path)
