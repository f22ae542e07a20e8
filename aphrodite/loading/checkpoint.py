"""One way to open a model, whatever its format: description first, bytes only when asked for."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.dummy import dummy_weights, packing_of
from aphrodite.loading.further_layers import without_further_layers
from aphrodite.loading.generation import GenerationDefaults, generation_from_config, generation_from_gguf
from aphrodite.loading.gguf import GGUFFile, GGUFValue, read_gguf
from aphrodite.loading.multimodal import text_tensors
from aphrodite.loading.quantized.methods import unpack_tensors
from aphrodite.loading.report import count_by_size, listed
from aphrodite.loading.safetensors import (
    INDEX_NAME,
    StoredTensor,
    read_safetensors,
    read_sharded_safetensors,
    read_shards,
    whole_set,
)
from aphrodite.loading.weights import Weights, match_weights
from aphrodite.models.families.rotary import ROPE_TENSORS
from aphrodite.models.registry import family_of_config, family_of_gguf, is_wrapped, text_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType, RawTensor

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "gguf", "safetensors", "dummy"]

SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
BESIDE_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # in names of GGUF files that are none
_QUANT_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TRUNK = "model."
_DTYPES = {
    "float32": QuantType.F32,
    "float16": QuantType.F16,
    "bfloat16": QuantType.BF16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open model.

    Attributes:
        path: the GGUF file, or the directory that holds config.json.
        name: a short name to serve the model under.
        architecture: what the checkpoint calls itself.
        weights: the parameters by canonical name (`loading/parameters.py`), views of the files.
        gguf: metadata of a GGUF file (its tokenizer lives there), else None.
    """

    path: Path
    name: str
    format: Literal["gguf", "safetensors", "dummy"]
    architecture: str
    spec: ModelSpec
    weights: Weights
    gguf: Mapping[str, GGUFValue] | None
    generation_defaults: GenerationDefaults

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return sum(parameter.count for parameter in self.weights.parameters.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(parameter.nbytes for parameter in self.weights.parameters.values())

    @property
    def tensors_by_type(self) -> dict[QuantType, int]:
        """Tensors of each type, the type with most bytes first; packed ones count as what they are expanded to."""
        return count_by_size((parameter.qtype, parameter.nbytes) for parameter in self.weights.parameters.values())

    @property
    def quantization(self) -> str:
        """For people: `Q4_1 (210 tensors), Q8_0 (1), F32 (61)`."""
        parameters = self.weights.parameters.values()
        (first, count), *rest = count_by_size((one.type_name, one.nbytes) for one in parameters).items()
        return ", ".join([f"{first} ({count} tensors)", *(f"{name} ({number})" for name, number in rest)])


def open_checkpoint(model: str | Path, *, load_format: LoadFormat = "auto") -> Checkpoint:
    """Open a GGUF file, a directory with safetensors or with one GGUF model, or a bare config.json.

    Only headers are read; missing, left-over and misshapen tensors are reported before memory is spent.

    Args:
        load_format: "dummy" makes random weights from config.json alone, in the type that it names.

    Raises:
        ModelFormatError: nothing there, ambiguous, damaged or not supported.
    """
    path = Path(model)
    if not path.exists():
        raise ModelFormatError(_not_found(str(model)))
    if load_format == "dummy":
        return _open_dummy(path)
    if load_format == "auto":
        load_format = _detect(path)
    return _open_gguf(gguf_file(path)) if load_format == "gguf" else _open_safetensors(path)


def model_path(path: Path, load_format: LoadFormat = "auto") -> Path:
    """Where the model at `path` lies, which exists: of a folder with one GGUF model that file, else `path` itself.

    Raises:
        ModelFormatError: the folder holds nothing of a model, or several GGUF models.
    """
    if not path.is_dir() or load_format not in ("auto", "gguf"):
        return path
    # A folder of settings without weights is for others to judge: its tokenizer and template may be all that is asked.
    described = any(path.glob("*.json")) and not any(path.glob("*.gguf"))
    if load_format == "auto" and (described or _detect(path) != "gguf"):
        return path
    return gguf_file(path)


def _not_found(model: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return (
            f"there is no file or folder {model}; if it is a model on the Hugging Face hub, "
            f"fetch it first: aphrodite models pull {model}"
        )
    return (
        f"there is no file or folder {model}; name a GGUF file, a folder with safetensors files, or a model on the "
        "Hugging Face hub as ORG/NAME"
    )


def _detect(path: Path) -> Literal["gguf", "safetensors"]:
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors"
        if path.suffix in PICKLE_SUFFIXES:
            raise ModelFormatError(_pickle_refusal(path))
        return "gguf"
    has_gguf = any(path.glob("*.gguf"))
    has_safetensors = any(path.glob("*.safetensors")) or (path / INDEX_NAME).exists()
    if has_gguf and has_safetensors:
        raise ModelFormatError(
            f"{path} holds both GGUF and safetensors files; choose with --load-format gguf or safetensors"
        )
    if has_gguf:
        return "gguf"
    if not has_safetensors and any(file for suffix in PICKLE_SUFFIXES for file in path.glob(f"*{suffix}")):
        raise ModelFormatError(_pickle_refusal(path))
    if not has_safetensors:
        raise ModelFormatError(
            f"{path} holds neither GGUF nor safetensors files; name a model's file or folder, "
            "or use --load-format dummy for random weights from a config.json"
        )
    return "safetensors"


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path}: .bin and .pt checkpoints are not loaded, because opening them can run any code they contain; "
        "convert the model to safetensors offline (transformers: save_pretrained), or download that version of it"
    )


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    metadata = ConfigReader(path, file.metadata)
    tensors = _with_splits(file, metadata)
    family = family_of_gguf(metadata)
    architecture = ConfigReader(path, file.metadata, prefix=f"{metadata.read('general.architecture', str)}.")
    spec = family.from_gguf(architecture, tensors)
    if family.predicts_further:
        tensors = without_further_layers(str(path), tensors, family.gguf.names, spec.num_layers)
    weights = match_weights(
        str(path),
        spec,
        tensors,
        family.gguf if family.gguf_of is None else family.gguf_of(tensors),
        # The former are part of the spec already, the latter computed from it.
        harmless=lambda name: name in ROPE_TENSORS or ".attn_rot_embd." in name,
    )
    return Checkpoint(
        path=path,
        name=gguf_name(path.name),
        format="gguf",
        architecture=metadata.read("general.architecture", str),
        spec=spec,
        weights=weights,
        gguf=file.metadata,
        generation_defaults=generation_from_gguf(metadata, spec.vocab_size),
    )


def gguf_file(path: Path) -> Path:
    """A GGUF file itself; of a directory its only GGUF model, and of one split over several files the first.

    Raises:
        ModelFormatError: the directory holds none, or several.
    """
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*.gguf") if not BESIDE_A_MODEL.search(file.name))
    splits = [match for file in files if (match := SPLIT_NAME.fullmatch(file.name))]
    if files and len(splits) == len(files) and len({(match[1], match[3]) for match in splits}) == 1:
        files = files[:1]
    if len(files) == 1:
        return files[0]
    if not files:
        raise ModelFormatError(f"{path} holds no .gguf file; name a GGUF file or a folder with one")
    names = ", ".join(file.name for file in files[:20])
    raise ModelFormatError(f"{path} holds {len(files)} GGUF files: name the one to load ({names})")


def _with_splits(file: GGUFFile, metadata: ConfigReader) -> Mapping[str, RawTensor]:
    """The tensors of a model that may continue in files named `…-00002-of-00003.gguf`."""
    count = metadata.read("split.count", int, 0, low=0, high=99_999)
    if count <= 1:
        return file.tensors
    match = SPLIT_NAME.fullmatch(file.path.name)
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise ModelFormatError(
            f"{file.path} is a part of a model split over {count} files; "
            f"name the first, which ends in -00001-of-{count:05}.gguf, with all of them beside it"
        )
    others = [file.path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]
    absent = [other.name for other in others if not other.exists()]
    if absent:
        raise ModelFormatError(f"{file.path}: {count} files belong together; {listed('missing', absent)[0]}")
    tensors = dict(file.tensors)
    for other in others:
        part = read_gguf(other)
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise ModelFormatError(f"{part.path}: tensor {twice!r} is also in another part; download the model again")
        tensors.update(part.tensors)
    return tensors


def _open_safetensors(path: Path) -> Checkpoint:
    directory = path.parent if path.is_file() else path
    config = ConfigReader.from_file(directory / "config.json")
    family = family_of_config(config)
    spec = family.from_config(text_config(config))
    stored = read_tensors(path)
    if is_wrapped(config):
        stored = text_tensors(str(directory), stored)
    stored = _of_causal_model(stored, family.hf.names.checkpoint_name("embed.weight"))
    if family.predicts_further:
        stored = without_further_layers(str(directory), stored, family.hf.names, spec.num_layers)
    tensors = unpack_tensors(stored, config, directory)
    head, embedding = (family.hf.names.checkpoint_name(f"{module}.weight") for module in ("head", "embed"))
    if head in tensors and embedding in tensors:
        spec = _with_own_head(spec, config, tensors, head, embedding)
    elif not spec.tied_head and embedding in tensors:
        spec = _with_shared_head(spec, config)
    weights = match_weights(
        str(directory),
        spec,
        tensors,
        family.hf if family.hf_of is None else family.hf_of(tensors),
        # The former is computed from the spec; quantizers write the latter for modules that have none.
        harmless=lambda name: name.endswith("rotary_emb.inv_freq") or _is_zero_bias(tensors[name]),
    )
    return _described(directory, "safetensors", config, spec, weights)


def _with_own_head(
    spec: ModelSpec, config: ConfigReader, tensors: dict[str, RawTensor], head: str, embedding: str
) -> ModelSpec:
    """`spec` for tensors with an output head; of a tied one the copy is taken out of them."""
    if not spec.tied_head:
        return spec
    if _same_bytes(tensors[head], tensors[embedding]):
        del tensors[head]
        return spec
    # transformers believes the weights, too
    logger.warning("%s ties the output head to the embedding, but %s differs and is used", config.source, head)
    return dataclasses.replace(spec, tied_head=False)


def _with_shared_head(spec: ModelSpec, config: ConfigReader) -> ModelSpec:
    """`spec` for tensors without an output head, though the text model's configuration does not say so."""
    if any(name.endswith("Model") for name in config.strings("architectures")):
        logger.warning("%s: the model has no output head: it makes embeddings, its texts mean nothing", config.source)
    elif not (is_wrapped(config) and config.read("tie_word_embeddings", bool, True)):
        return spec
    return dataclasses.replace(spec, tied_head=True)


def _of_causal_model(stored: dict[str, StoredTensor], embedding: str) -> dict[str, StoredTensor]:
    """The tensors under the names that a model with an output head has: embedding models are often saved without one,
    and without the prefix of what stands before it. `embedding` is the name of the input embedding with it."""
    bare = embedding.removeprefix(_TRUNK)
    if embedding in stored or bare not in stored or bare == embedding:
        return stored
    return {_TRUNK + name: tensor for name, tensor in stored.items()}


def _same_bytes(a: RawTensor, b: RawTensor) -> bool:
    return a.type_name == b.type_name and np.array_equal(a.data, b.data)


def _is_zero_bias(raw: RawTensor) -> bool:
    return raw.name.endswith(".bias") and not raw.data.any()


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of the one model in a directory. Reads only headers.

    Raises:
        ModelFormatError: there is none, it is not clear which files belong together, or one is damaged.
    """
    if path.is_file():
        return read_safetensors(path)
    single = path / "model.safetensors"
    if single.exists():
        return read_safetensors(single)
    if (path / INDEX_NAME).exists():
        return read_sharded_safetensors(path / INDEX_NAME)
    files = sorted(path.glob("*.safetensors"))
    shards = whole_set(file.name for file in files)
    if shards:
        return read_shards(path, [path / name for name in shards])
    if len(files) != 1:
        raise ModelFormatError(
            f"{path} holds {len(files)} safetensors files and no {INDEX_NAME} that says which belong together; "
            "download the model again"
        )
    return read_safetensors(files[0])


def _open_dummy(path: Path) -> Checkpoint:
    file = path if path.is_file() else path / "config.json"
    if file.suffix == ".gguf":
        raise ModelFormatError(f"{file}: dummy weights are made from a config.json, not from a GGUF file")
    config = ConfigReader.from_file(file)
    family = family_of_config(config)
    spec = family.from_config(text_config(config))
    dtype = config.choice("dtype" if config.has("dtype") else "torch_dtype", _DTYPES, "bfloat16")
    return _described(file.parent, "dummy", config, spec, dummy_weights(spec, dtype, packing=packing_of(config)))


def gguf_stem(file: str) -> str:
    """The name of a GGUF file, or of the whole that it is a part of, without its ending."""
    split = SPLIT_NAME.fullmatch(file)
    return split[1] if split else Path(file).stem


def gguf_name(file: str) -> str:
    """A GGUF model's name: its file's without the quantization."""
    return _QUANT_SUFFIX.sub("", gguf_stem(file))


def checkpoint_name(directory: Path) -> str:
    """A short name for a directory's model: the directory's, or in the Hugging Face cache the repository's."""
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.rsplit("--", 1)[1]
    return resolved.name


def _described(
    directory: Path, kind: Literal["safetensors", "dummy"], config: ConfigReader, spec: ModelSpec, weights: Weights
) -> Checkpoint:
    return Checkpoint(
        path=directory,
        name=checkpoint_name(directory),
        format=kind,
        architecture=", ".join(config.strings("architectures")) or config.read("model_type", str, ""),
        spec=spec,
        weights=weights,
        gguf=None,
        generation_defaults=generation_from_config(config, directory, spec.vocab_size),
    )
