"""Checkpoints of architectures that are not built in, for transformers' own modelling code to compute.

Only opened here: headers are read, nothing of transformers is imported and no weight is touched.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aphrodite.errors import UnknownArchitectureError
from aphrodite.loading.checkpoint import Checkpoint, LoadFormat, checkpoint_name, open_checkpoint, read_tensors
from aphrodite.loading.config_reader import ConfigReader, load_json_object
from aphrodite.loading.generation import GenerationDefaults, generation_from_config
from aphrodite.loading.quantized.methods import quantization_of, unpack_tensors
from aphrodite.loading.report import count_by_size
from aphrodite.loading.safetensors import DENSE_TYPES, StoredTensor
from aphrodite.quantization.types import QuantType, RawTensor

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

INSTALL = "pip install 'aphrodite-engine[transformers]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheckpoint:
    """An open safetensors checkpoint of an architecture that is not built in.

    Attributes:
        path: the directory that holds config.json.
        architecture: the first of its `architectures`.
        config: config.json as it was parsed.
        tensors: by the checkpoint's names: as they lie in the files, or of a quantized checkpoint what the modules'
            tensors stand for.
    """

    path: Path
    name: str
    architecture: str
    config: Mapping[str, object]
    tensors: Mapping[str, StoredTensor | RawTensor]
    generation_defaults: GenerationDefaults

    @property
    def format(self) -> Literal["safetensors"]:
        return "safetensors"

    @property
    def parameters(self) -> int:
        """Number of values of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors_by_type(self) -> dict[QuantType, int]:
        """Tensors of each type, that with most bytes first; packed ones count as what they are expanded to."""
        types = (
            (tensor.qtype if isinstance(tensor, RawTensor) else DENSE_TYPES.get(tensor.dtype), tensor.nbytes)
            for tensor in self.tensors.values()
        )
        return count_by_size((qtype, nbytes) for qtype, nbytes in types if qtype is not None)


def open_model(model: str | Path, *, load_format: LoadFormat = "auto") -> Checkpoint | ForeignCheckpoint:
    """Open a checkpoint, whether its architecture is built in or left to transformers.

    Raises:
        ModelFormatError: it cannot be opened (see `open_checkpoint`), or nobody here knows its architecture.
    """
    try:
        return open_checkpoint(model, load_format=load_format)
    except UnknownArchitectureError as error:
        return _open_foreign(Path(model), load_format, error)


def open_described(model: str | Path, *, load_format: LoadFormat = "auto") -> Checkpoint | ForeignLoader:
    """As `open_model`; what is left to transformers has also been found to run there, for which it is imported.

    Raises:
        ModelFormatError: as `open_model`, or transformers cannot serve it here; the message says why.
    """
    opened = open_model(model, load_format=load_format)
    if isinstance(opened, Checkpoint):
        return opened
    from aphrodite.models.foreign import describe  # imports torch and transformers

    return describe(opened)


def _open_foreign(path: Path, load_format: LoadFormat, error: UnknownArchitectureError) -> ForeignCheckpoint:
    directory = path.parent if path.is_file() else path
    if load_format in ("gguf", "dummy") or not any(directory.glob("*.safetensors")):
        raise error
    if importlib.util.find_spec("transformers") is None:
        raise UnknownArchitectureError(f"{error}. Others run, slower, through transformers: {INSTALL}") from None
    config = load_json_object(directory / "config.json")
    reader = ConfigReader(directory / "config.json", config)
    stored = read_tensors(path)
    quantized = quantization_of(reader, directory) is not None
    architectures = reader.strings("architectures")
    vocab_size = (reader.section("text_config") or reader).read("vocab_size", int, low=1, high=1 << 24)
    return ForeignCheckpoint(
        path=directory,
        name=checkpoint_name(directory),
        architecture=architectures[0] if architectures else "",
        config=config,
        tensors=unpack_tensors(stored, reader, directory) if quantized else stored,
        generation_defaults=generation_from_config(reader, directory, vocab_size),
    )
