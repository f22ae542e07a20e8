"""Which files of a model's repository are needed: one set of weights and what describes it, nothing twice.

Works on names and sizes alone, whether they come from a hub or from what is already on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from aphrodite.errors import ConfigError
from aphrodite.loading.checkpoint import BESIDE_A_MODEL, PICKLE_SUFFIXES, SPLIT_NAME, LoadFormat
from aphrodite.loading.pooling import MODULES_NAME
from aphrodite.loading.safetensors import INDEX_NAME, shard_names, whole_set

# What of a repository describes a model beside its weights: configuration, tokenizer, chat templates, pooling.
_DESCRIPTION = (
    *("config.json", "generation_config.json", "quantize_config.json", "hf_quant_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *(MODULES_NAME, *(f"{number}_Pooling/config.json" for number in range(1, 4))),
)
_OTHER_VOCABULARIES = ("tokenizer.model", "tekken.json", "tiktoken.model")  # where there is no tokenizer.json
_TEMPLATE_FOLDER = "additional_chat_templates"
_SINGLE = "model.safetensors"

# The best balance of size and quality first, then better ones, then smaller ones, then those that fit nowhere else.
PREFERRED = (
    *("Q4_K_M", "Q4_K_XL", "Q5_K_M", "Q5_K_XL", "Q6_K", "Q6_K_XL", "Q8_0", "Q8_K_XL", "Q4_K_L", "Q5_K_L", "Q6_K_L"),
    *("Q5_K_S", "Q5_K", "Q4_K_S", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "Q5_1", "Q5_0", "MXFP4", "MXFP4_MOE"),
    *("Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS"),
    *("Q2_K_XL", "Q2_K_L", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    *("TQ2_0", "TQ1_0", "BF16", "F16", "F32"),
)
_WORKSPACE = 1 << 29  # bytes beside the weights, for a KV cache and activations that are of use
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Za-z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))(?![A-Za-z0-9_])",
    re.IGNORECASE,
)


# Layouts that llama.cpp has given up, still to be found beside the others.
_RETIRED = re.compile(r"(Q4_0|IQ4_NL)_[48]_[48]")
_PIECE = re.compile(r"(.+\.gguf)[.-](part\d+of\d+|split-[a-z]+)", re.IGNORECASE)


class Room(NamedTuple):
    """Memory that a model's weights may take."""

    bytes: int
    where: str  # "memory", "GPU memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """One GGUF model of a repository, in one file or split over several.

    Attributes:
        label: its quantization, as its name tells; "" where it does not.
        files: in order; the first is the one to open.
        size: bytes of all.
    """

    label: str
    files: tuple[str, ...]
    size: int

    @property
    def title(self) -> str:
        """What to ask for it by."""
        return self.label or self.files[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Files to have.

    Attributes:
        load_format: what they are.
        files: paths in the repository.
        entry: the one to open; None stands for the folder.
        reason: why these, for people.
    """

    load_format: LoadFormat
    files: tuple[str, ...]
    entry: str | None
    reason: str


def select(
    repo: str,
    files: Mapping[str, int],
    *,
    variant: str | None,
    load_format: LoadFormat,
    room: Callable[[], Room],
    fetch: Callable[[str], Path],
) -> Selection:
    """Choose what to have of a repository.

    Without a variant these are the safetensors files where there are some, else the GGUF model that is the first in
    the order of preference to fit into memory.

    Args:
        repo: the repository's name, for messages.
        files: its files with their bytes.
        variant: the quantization or the name of a GGUF file that was asked for.
        load_format: what was asked for.
        room: asked only where a choice depends on it.
        fetch: makes one small file of the repository readable.

    Raises:
        ConfigError: it has nothing of what was asked for, or nothing that can be loaded.
    """
    ggufs = gguf_models(files)
    has_safetensors = "config.json" in files and any(_is_weights(name) for name in files)
    if variant is not None:
        if load_format not in ("auto", "gguf"):
            raise ConfigError(f"{repo}:{variant} names a GGUF file, but --load-format is {load_format}")
        return _gguf(_named(repo, files, ggufs, variant), f"{variant}, as asked for")
    if load_format == "dummy":
        return Selection(load_format="dummy", files=_description(files), entry=None, reason="only its configuration")
    if load_format != "gguf" and has_safetensors:
        also = f"; it also has GGUF files: {_titles(repo, ggufs)}" if ggufs else ""
        weights = _safetensors(repo, files, fetch)
        return Selection(
            load_format="safetensors",
            files=(*_description(files), *weights),
            entry=None,
            reason=f"its safetensors files{also}",
        )
    if load_format != "safetensors" and ggufs:
        return _best(repo, ggufs, room)
    raise ConfigError(_nothing(repo, files, load_format))


def gguf_models(files: Mapping[str, int]) -> list[GgufModel]:
    """The GGUF models among `files`, by name; projectors for images and importance matrices are none, and neither are
    split models of which parts are missing."""
    models = []
    for name in sorted(files):
        if not name.endswith(".gguf") or BESIDE_A_MODEL.search(PurePosixPath(name).name):
            continue
        split = SPLIT_NAME.fullmatch(name)
        if split is None:
            parts = [name]
        elif int(split[2]) == 1:
            parts = [f"{split[1]}-{number:05}-of-{split[3]}.gguf" for number in range(1, int(split[3]) + 1)]
        else:
            continue
        if all(part in files for part in parts):
            stem = split[1] if split else name.removesuffix(".gguf")
            label = _label(PurePosixPath(stem).name) or _label(PurePosixPath(stem).parent.name)
            models.append(GgufModel(label=label, files=tuple(parts), size=sum(files[part] for part in parts)))
    return models


def is_split(name: str) -> bool:
    """Whether a file is a part of a split GGUF model."""
    return SPLIT_NAME.fullmatch(name) is not None


def _label(text: str) -> str:
    """The last quantization that a name mentions."""
    found = _LABEL.findall(text)
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def _named(repo: str, files: Iterable[str], ggufs: list[GgufModel], variant: str) -> GgufModel:
    """The one model that `variant` means: by file, by quantization, by quantization but for its maker's prefix."""
    pieces = _pieces(files)
    if not ggufs and not pieces:
        raise ConfigError(f"{repo} has no GGUF files, so there is no {variant} of it: aphrodite run {repo}")
    wanted = variant.upper().removesuffix(".GGUF")
    tests: tuple[Callable[[GgufModel], bool], ...] = (
        lambda model: wanted in (_upper(model.files[0]), _upper(PurePosixPath(model.files[0]).name)),
        lambda model: model.label == wanted,
        lambda model: model.label.removeprefix("UD-") == wanted,
    )
    for test in tests:
        found = [model for model in ggufs if test(model)]
        if len(found) > 1:
            names = ", ".join(model.files[0] for model in found)
            raise ConfigError(f"{repo} has {len(found)} GGUF files of {variant}; name one: {repo}:FILE of {names}")
        if found:
            return found[0]
    meant = [name for name in pieces if variant.upper() in name.upper()]
    if meant:
        raise ConfigError(_in_pieces(repo, meant))
    raise ConfigError(f"{repo} has no {variant}; it has {_titles(repo, ggufs) if ggufs else 'models in pieces only'}")


def _pieces(files: Iterable[str]) -> list[str]:
    """The pieces of GGUF files that were cut without regard to their contents, in the order in which they are joined:
    numbers by their values."""
    found = (name for name in files if _PIECE.fullmatch(name))
    return sorted(found, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))


def _in_pieces(repo: str, pieces: Sequence[str]) -> str:
    whole = pieces[0][: pieces[0].lower().rindex(".gguf") + 5]
    own = [name for name in pieces if name.startswith(whole)]
    return (
        f"{repo} has {whole} in pieces that have to be joined ({', '.join(own)}): download them, "
        f"join them with cat in this order, and name the file"
    )


def _upper(file: str) -> str:
    return file.upper().removesuffix(".GGUF")


def _best(repo: str, ggufs: list[GgufModel], room: Callable[[], Room]) -> Selection:
    """The first in the order of preference that fits; the smallest where none does."""
    if len(ggufs) == 1:
        return _gguf(ggufs[0], f"{ggufs[0].title}, its only GGUF file")
    there = room()
    ranks = {label: rank for rank, label in enumerate(PREFERRED)}
    ggufs = [model for model in ggufs if not _RETIRED.fullmatch(model.label)] or ggufs
    ordered = sorted(ggufs, key=lambda model: (ranks.get(model.label.removeprefix("UD-"), len(ranks)), model.size))
    fits = [model for model in ordered if model.size + _WORKSPACE <= there.bytes]
    chosen = fits[0] if fits else min(ggufs, key=lambda model: model.size)
    free = f"{_gigabytes(there.bytes)} of free {there.where}"
    why = f"the first in order of preference that fits {free}" if fits else f"the smallest, though none fits {free}"
    others = [model for model in ggufs if model is not chosen]
    also = f"; it also has {_titles(repo, others)}" if others else ""
    return _gguf(chosen, f"{chosen.title} ({_gigabytes(chosen.size)}), {why}{also}")


def _gguf(model: GgufModel, reason: str) -> Selection:
    return Selection(load_format="gguf", files=model.files, entry=model.files[0], reason=reason)


def _titles(repo: str, ggufs: Iterable[GgufModel]) -> str:
    titles = list(dict.fromkeys(model.title for model in ggufs))
    more = f" and {len(titles) - 12} more" if len(titles) > 12 else ""
    return f"{', '.join(titles[:12])}{more} (name one: {repo}:{titles[0]})"


def _is_weights(name: str) -> bool:
    return name == INDEX_NAME or ("/" not in name and name.endswith(".safetensors") and "adapter" not in name)


def _safetensors(repo: str, files: Mapping[str, int], fetch: Callable[[str], Path]) -> tuple[str, ...]:
    """One complete set of weights: a single file before an indexed set, which it would double."""
    if _SINGLE in files:
        return (_SINGLE,)
    if INDEX_NAME in files:
        return (INDEX_NAME, *shard_names(fetch(INDEX_NAME)))
    found = [name for name in files if _is_weights(name)]
    if shards := whole_set(found):
        return tuple(shards)
    if len(found) == 1:
        return (found[0],)
    raise ConfigError(
        f"{repo} holds {len(found)} safetensors files ({', '.join(sorted(found)[:4])}, …) and no {INDEX_NAME} that "
        "says which belong together; download the one you want and name its folder"
    )


def _description(files: Mapping[str, int]) -> tuple[str, ...]:
    found = [name for name in _DESCRIPTION if name in files]
    if "tokenizer.json" not in files:
        found += [name for name in _OTHER_VOCABULARIES if name in files][:1]
    templates = [name for name in files if PurePosixPath(name).parent == PurePosixPath(_TEMPLATE_FOLDER)]
    return (*found, *sorted(name for name in templates if name.endswith(".jinja")))


def _nothing(repo: str, files: Mapping[str, int], load_format: LoadFormat) -> str:
    """Why a repository has nothing to load."""
    if load_format in ("gguf", "safetensors"):
        return f"{repo} has no {load_format} model; leave --load-format at auto to load what it has"
    if any("adapter" in name for name in files if name.endswith((".safetensors", ".bin"))):
        return f"{repo} is an adapter (LoRA), not a model: name the model that it was made for"
    if any(_is_weights(name) for name in files):
        own = " (params.json is Mistral's own description, which is not read)" if "params.json" in files else ""
        return (
            f"{repo} has safetensors files but no config.json that describes them{own}; look for another version of it"
        )
    if any(name.endswith(PICKLE_SUFFIXES) for name in files):
        return (
            f"{repo} has only .bin or .pt weights, which are not loaded, because opening them can run any code they "
            "contain; look for a safetensors or GGUF version of the model"
        )
    pieces = _pieces(files)
    if pieces:
        return _in_pieces(repo, pieces)
    return f"{repo} has neither safetensors nor GGUF files to load ({len(files)} files)"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
