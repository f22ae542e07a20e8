"""What a checkpoint says about embeddings: how hidden states are pooled, and whether the result is normalised.

Safetensors checkpoints say it as sentence-transformers does: `modules.json` lists the steps that make an embedding, and
the folder of the pooling step holds a config.json (https://sbert.net/docs/package_reference). GGUF files have
`{architecture}.pooling_type` (llama.cpp's `llama_pooling_type`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aphrodite.core.plan import Pooling
from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader, load_json_object
from aphrodite.loading.files import read_small_file
from aphrodite.loading.gguf import GGUFValue

MODULES_NAME = "modules.json"
# llama.cpp's numbers; 0 is "none", and 4 is a ranking of pairs of texts.
_GGUF_POOLINGS: Mapping[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
# sentence-transformers' switches, and the older and newer names of one.
_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "cls",
}
_MODES: Mapping[str, Pooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
_FOLDER = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class PoolingDefaults:
    """How a checkpoint's embeddings are made.

    Attributes:
        pooling: of the hidden states behind the final norm. A decoder that says nothing of embeddings has seen all of
            a text at its last token only.
        normalize: embeddings have length 1.
        declined: why its embeddings cannot be made; None if they can.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    declined: str | None = None


def pooling_from_gguf(metadata: Mapping[str, GGUFValue], source: Path) -> PoolingDefaults:
    """From GGUF metadata.

    Raises:
        ModelFormatError: the pooling type is no number of llama.cpp's.
    """
    reader = ConfigReader(source, metadata)
    kind = reader.read(f"{reader.read('general.architecture', str)}.pooling_type", int, 0, low=-1, high=4)
    if kind == 4:
        return PoolingDefaults(declined="this model ranks pairs of texts and has no embeddings")
    return PoolingDefaults(_GGUF_POOLINGS.get(kind, "last"))


def pooling_from_directory(directory: Path) -> PoolingDefaults:
    """From the modules.json of a checkpoint's directory; the defaults where there is none.

    Raises:
        ModelFormatError: it, or the pooling step's config.json, is damaged.
    """
    file = directory / MODULES_NAME
    if not file.exists():
        return PoolingDefaults()
    pooling: Pooling = "last"
    normalize = False
    for kind, path in _modules(file):
        if kind == "Pooling":
            found = _pooling_of(directory / path / "config.json")
            if found is None:
                return PoolingDefaults(
                    declined="this model pools in a way that is not supported: mean, last or cls are"
                )
            pooling = found
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            return PoolingDefaults(declined=f"this model's embeddings pass through a {kind[:64]} layer of their own")
    return PoolingDefaults(pooling, normalize)


def _modules(file: Path) -> list[tuple[str, str]]:
    """The steps' kinds and folders, in order."""
    try:
        found = json.loads(read_small_file(file))
        if not isinstance(found, list):
            raise TypeError(type(found))
        steps = [(str(step["type"]).rpartition(".")[2], str(step["path"])) for step in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ModelFormatError(f"{file} should hold a list of modules with type and path; download it again") from None
    if any(path and not _FOLDER.fullmatch(path) for _, path in steps):
        raise ModelFormatError(f"{file} names a folder that is not beside it; download it again")
    return steps


def _pooling_of(file: Path) -> Pooling | None:
    """The one way of pooling that is switched on, None where it is another or more than one."""
    values = load_json_object(file)
    config = ConfigReader(file, values)
    if config.has("pooling_mode"):
        return _MODES.get(config.read("pooling_mode", str, ""))
    chosen = [key for key in values if key.startswith("pooling_mode_") and config.read(key, bool, False)]
    return _POOLINGS.get(chosen[0]) if len(chosen) == 1 else None
