"""Low-rank adapters (LoRA, arXiv 2106.09685) from PEFT's folders and from GGUF files: W x becomes W x + s B A x.

PEFT (https://huggingface.co/docs/peft/developer_guides/checkpoint) keeps `adapter_config.json` beside
`adapter_model.safetensors` with `….lora_A.weight` `[rank, in]` and `….lora_B.weight` `[out, rank]` of every module;
s is alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). llama.cpp keeps the same pairs under its own names
in a GGUF file whose `general.type` is "adapter".

Only headers are read before an adapter is known to fit its model: modules, shapes and rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aphrodite.errors import InvalidRequestError, ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.gguf import read_gguf, read_gguf_metadata
from aphrodite.loading.multimodal import text_tensors
from aphrodite.loading.parameters import Storage, parameter_shapes
from aphrodite.loading.report import listed
from aphrodite.loading.safetensors import dense_tensors, read_safetensors
from aphrodite.loading.weights import matrix_places
from aphrodite.matching.regex import RegexScanner, compile_regexes
from aphrodite.models.registry import family_named
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType, RawTensor

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_RANK = 128

# Projections that can have an adapter, by canonical name; of latent attention only those behind it.
_PARTS = ("q", "k", "v", "o", "gate", "up", "down")
_DENSE = (QuantType.F32, QuantType.F16, QuantType.BF16)
_PEFT_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight")
_GGUF_KEY = re.compile(r"(.+)\.weight\.lora_([ab])")
# What changes an adapter's meaning beyond s B A x, by key of adapter_config.json.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal matrices",
    "kasa_config": "KaSA",
    "arrow_config": "routing among adapters (Arrow)",
    "lora_bias": "biases of B",
    "target_parameters": "adapters of parameters (experts)",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
}


class LowRank(NamedTuple):
    """What an adapter adds to one weight `[out, in]`: scale * b a. Stored as F32, F16 or BF16."""

    a: RawTensor  # [rank, in]
    b: RawTensor  # [out, rank], its rows in the decoder's order
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter that fits a model.

    Attributes:
        pairs: by canonical name of the weight's module (`layers.3.q`).
        rank: the largest of theirs.
    """

    path: Path
    pairs: Mapping[str, LowRank]
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes as they are stored."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    def copied(self) -> Adapter:
        """The same in memory of its own: the file may change or go."""
        held: dict[int, RawTensor] = {}

        def copy(raw: RawTensor) -> RawTensor:
            if id(raw) not in held:
                held[id(raw)] = RawTensor(raw.name, raw.shape, raw.qtype, np.array(raw.data))
            return held[id(raw)]

        pairs = {name: LowRank(copy(pair.a), copy(pair.b), pair.scale) for name, pair in self.pairs.items()}
        return Adapter(path=self.path, pairs=pairs, rank=self.rank)


class AdapterFile(NamedTuple):
    """An adapter as its file has it, whatever its model.

    Attributes:
        base: the model that it says it is for.
        matrices: A and B of each module, under the checkpoint's name of the module.
        scales: of each module.
        others: names of tensors that are no part of a pair.
        gguf: whether modules have llama.cpp's names.
    """

    path: Path
    base: str | None
    matrices: Mapping[str, tuple[RawTensor, RawTensor]]
    scales: Mapping[str, float]
    others: list[str]
    gguf: bool

    @property
    def rank(self) -> int:
        """The largest of the modules'."""
        return max((a.shape[0] for a, _ in self.matrices.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes as they are stored."""
        return sum(a.nbytes + b.nbytes for a, b in self.matrices.values())


def is_adapter(path: Path) -> bool:
    """Whether a folder or file is an adapter and not a model. Reads headers only.

    Raises:
        ModelFormatError: a GGUF file is damaged.
    """
    if path.is_dir():
        return (path / CONFIG_NAME).exists() and not (path / "config.json").exists()
    if path.suffix == ".gguf":
        return read_gguf_metadata(path).get("general.type") == "adapter"
    return path.name in (CONFIG_NAME, WEIGHTS_NAME)


def read_adapter(path: Path, spec: ModelSpec, *, max_rank: int = MAX_RANK) -> Adapter:
    """The adapter in a PEFT folder or GGUF file, checked against the model `spec`. Reads headers only.

    Raises:
        ModelFormatError: it is missing, damaged, of another kind or another model, or its rank is above `max_rank`.
    """
    file = open_adapter(path)
    family = family_named(spec.family)
    if family is None:
        raise ModelFormatError(f"{path}: adapters are for built-in families of models, and {spec.family} is none")
    pairs = _fitted(file, spec, family.gguf if file.gguf else family.hf)
    if file.rank > max_rank:
        raise ModelFormatError(
            f"{path}: its rank is {file.rank} and the largest with room here is {max_rank}"
            + (f"; start with --max-lora-rank {file.rank}" if file.rank <= MAX_RANK else "")
        )
    return Adapter(path=path, pairs=pairs, rank=file.rank)


def open_adapter(path: Path) -> AdapterFile:
    """Read the headers of a PEFT folder, or of a GGUF file with an adapter.

    Raises:
        ModelFormatError: it is missing, damaged or of a kind that cannot be served.
    """
    if path.is_dir():
        return _open_peft(path)
    if path.name in (CONFIG_NAME, WEIGHTS_NAME):
        return _open_peft(path.parent)
    if path.suffix == ".gguf" and path.exists():
        return _open_gguf(path)
    raise ModelFormatError(
        f"there is no adapter at {path}; name a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a GGUF file"
    )


def _open_peft(folder: Path) -> AdapterFile:
    if not (folder / WEIGHTS_NAME).exists():
        if (folder / PICKLE_NAME).exists():
            raise ModelFormatError(
                f"{folder}: {PICKLE_NAME} is not loaded, because opening it can run any code it contains; save the "
                "adapter again with safetensors (PEFT's save_pretrained does by default)"
            )
        raise ModelFormatError(f"{folder} holds no {WEIGHTS_NAME}; name the folder of a PEFT adapter")
    config = ConfigReader.from_file(folder / CONFIG_NAME)
    kind = config.read("peft_type", str, "LORA")
    if kind.upper() != "LORA":
        raise ModelFormatError(f"{folder}: adapters of type {kind!r} are not supported, only LORA")
    variants = [what for key, what in _VARIANTS.items() if config.is_set(key)]
    if variants:
        raise ModelFormatError(f"{folder}: adapters with {' and '.join(variants)} are not supported, only plain LoRA")
    stored = read_safetensors(folder / WEIGHTS_NAME)
    names = text_tensors(str(folder), {name.removeprefix("base_model.model."): name for name in stored})
    dense = dense_tensors({name: stored[original] for name, original in names.items()})
    matrices, others = _pairs(folder, dense, _PEFT_KEY)
    return AdapterFile(
        folder, config.read("base_model_name_or_path", str, None), matrices, _scales(config, matrices), others, False
    )


def _open_gguf(path: Path) -> AdapterFile:
    file = read_gguf(path)
    metadata = ConfigReader(path, file.metadata)
    if metadata.read("general.type", str, "model") != "adapter" or metadata.read("adapter.type", str, "") != "lora":
        raise ModelFormatError(f"{path} is a model and no LoRA adapter; load it with --model")
    alpha = metadata.read("adapter.lora.alpha", float, 0.0)
    matrices, others = _pairs(path, file.tensors, _GGUF_KEY)
    scales = {name: alpha / a.shape[0] if alpha else 1.0 for name, (a, _) in matrices.items()}
    return AdapterFile(path, metadata.read("general.base_model.0.name", str, None), matrices, scales, others, True)


def _pairs(
    source: Path, tensors: Mapping[str, RawTensor], key: re.Pattern[str]
) -> tuple[dict[str, tuple[RawTensor, RawTensor]], list[str]]:
    """A and B of each module, and the names of what is neither."""
    halves: dict[str, dict[str, RawTensor]] = {}
    others = []
    for name, raw in tensors.items():
        match = key.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        halves.setdefault(match[1], {})[match[2].lower()] = raw
        if len(raw.shape) != 2 or raw.qtype not in _DENSE:
            what = f"{list(raw.shape)} of type {raw.type_name}"
            raise ModelFormatError(f"{source}: {name} is {what}; adapters hold matrices in F32, F16 or BF16")
    single = [name for name, pair in halves.items() if len(pair) != 2]
    whole = {name: (pair["a"].shape[0], pair["b"].shape[1]) for name, pair in halves.items() if len(pair) == 2}
    odd = [name for name, (a, b) in whole.items() if a != b]
    empty = [name for name, ranks in whole.items() if ranks == (0, 0)]
    if single or odd or empty or not halves:
        problems = listed("A without B, or B without A", single) + listed("A and B of different ranks", odd)
        problems += listed("A and B of rank 0", empty)
        raise ModelFormatError(f"{source} is damaged: {'; '.join(problems) or 'it holds no LoRA matrices'}")
    return {name: (pair["a"], pair["b"]) for name, pair in halves.items()}, others


def _scales(config: ConfigReader, matrices: Mapping[str, tuple[RawTensor, RawTensor]]) -> dict[str, float]:
    """alpha / rank of each module. Keys of `alpha_pattern` are regular expressions for the end of a module's name."""
    alpha = config.read("lora_alpha", float, 8.0)
    rooted = config.read("use_rslora", bool, False)
    patterns = config.section("alpha_pattern")
    keys = [] if patterns is None else patterns.keys
    special = [(_ending(config.source, key), patterns.read(key, float)) for key in keys if patterns is not None]
    scales = {}
    for name, (a, _) in matrices.items():
        own = next((value for ending, value in special if _matches(ending, name)), alpha)
        scales[name] = own / (a.shape[0] ** 0.5 if rooted else a.shape[0])
    return scales


def _ending(source: str, key: str) -> str:
    """The pattern of whole names that end with what `key` matches, tried once so that errors name the file."""
    pattern = rf"^(.*\.)?({key})$"
    try:
        compile_regexes((pattern,))
    except InvalidRequestError as error:
        raise ModelFormatError(f"{source}: alpha_pattern {key[:200]!r} cannot be used: {error}") from None
    return pattern


def _matches(pattern: str, name: str) -> bool:
    scanner = RegexScanner(compile_regexes((pattern,)))  # in linear time, whoever wrote the pattern
    return scanner.push(name) is not None or scanner.finish() is not None


def _fitted(file: AdapterFile, spec: ModelSpec, storage: Storage) -> dict[str, LowRank]:
    """The pairs by canonical module, with rows of B as the decoder has them.

    Raises:
        ModelFormatError: modules that the model has not, or that cannot have an adapter; wrong shapes.
    """
    shapes = _adaptable(spec)
    places = matrix_places(spec, shapes, storage)
    left_over = dict.fromkeys(file.matrices)
    misshapen: dict[str, None] = {}
    pairs: dict[str, LowRank] = {}
    for canonical, place in places.items():
        if place.name not in file.matrices:
            continue
        left_over.pop(place.name, None)
        a, b = file.matrices[place.name]
        expected = (place.rows, shapes[canonical][1])
        if (b.shape[0], a.shape[1]) != expected:
            found = [b.shape[0], a.shape[1]]
            misshapen[f"{place.name} is for a weight {found} and the model has {list(expected)}"] = None
            continue
        pairs[canonical.removesuffix(".weight")] = LowRank(a, place.arranged(b), file.scales[place.name])
    problems = listed("wrong shapes", misshapen) + _unplaced([*left_over, *file.others], spec)
    if problems:
        base = f" (it says that it is for {file.base})" if file.base else ""
        raise ModelFormatError(f"{file.path} does not fit this {spec.family} model{base}: " + "; ".join(problems))
    return pairs


def _adaptable(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that can have an adapter."""
    parts = _PARTS if spec.mla is None else ("o", "gate", "up", "down")
    return {
        name: shape
        for name, shape in parameter_shapes(spec).items()
        if name.startswith("layers.") and name.endswith(".weight") and name.split(".")[2] in parts
    }


def _unplaced(names: Iterable[str], spec: ModelSpec) -> list[str]:
    """What is wrong with tensors that no weight can take."""
    names = list(names)
    experts = [name for name in names if ".experts" in name or "_exps" in name]
    ends = [name for name in names if re.search(r"embed|lm_head|token_embd|\boutput\b", name) and name not in experts]
    latent = [] if spec.mla is None else [name for name in names if re.search(r"(q|kv)(_\w+)?_proj", name)]
    rest = [name for name in names if name not in (*experts, *ends, *latent)]
    return (
        listed("experts cannot have adapters", experts)
        + listed("embedding and output head cannot have adapters", ends)
        + listed("projections of latent attention cannot have adapters", latent)
        + listed("no module of the model", rest)
    )
