"""What a checkpoint is and what it needs, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aphrodite.errors import ModelFormatError
from aphrodite.loading.checkpoint import Checkpoint, LoadFormat
from aphrodite.loading.config_reader import load_json_object
from aphrodite.loading.foreign import ForeignCheckpoint, open_described
from aphrodite.models.shape import ForeignSpec
from aphrodite.models.spec import ModelSpec

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

KV_ELEMENT_BYTES = 2  # float16, the default
EXPANDED_WEIGHT_BYTES = 2  # bfloat16 or float16
_CONTEXTS = (4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Weights plus the KV cache of one sequence of `context` tokens, in bytes."""

    context: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A checkpoint in numbers. Sizes are bytes, lengths are tokens.

    Attributes:
        architecture: what the checkpoint calls itself (`LlamaForCausalLM`, GGUF's `llama`).
        parameters_by_type: weights stored in each type, most first.
        window: the narrowest sliding window, or None.
        tokenizer: kind of the tokenizer, or None where the checkpoint has none.
        kv_bytes_per_token: at float16, over all layers.
        weight_bytes: as they are stored, which is what kernels for their types need.
        expanded_bytes: at 16 bits a weight, which is what is needed where a type has no kernel.
        memory: need at 4k, 8k (where the model reaches that far) and the full context, weights as they are stored.
    """

    name: str
    path: Path
    format: str
    family: str
    architecture: str
    parameters: int
    quantization: str
    parameters_by_type: dict[str, int]
    vocab_size: int
    max_position: int
    rotary_scaling: str
    window: int | None
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied_head: bool
    tokenizer: str | None
    chat_template: bool
    weight_bytes: int
    expanded_bytes: int
    kv_bytes_per_token: int
    memory: tuple[MemoryNeed, ...]


def inspect(model: str | Path, *, load_format: LoadFormat = "auto") -> Inspection:
    """Describe a checkpoint without loading it.

    Raises:
        ModelFormatError: it cannot be opened (see `open_described`).
    """
    opened = open_described(model, load_format=load_format)
    return inspect_checkpoint(opened) if isinstance(opened, Checkpoint) else inspect_foreign(opened)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe an open checkpoint; reads no weights."""
    spec = checkpoint.spec
    counts = [(parameter.type_name, parameter.count) for parameter in checkpoint.weights.parameters.values()]
    return _inspection(checkpoint, spec, counts, checkpoint.quantization, spec.kv_dim, spec.rotary.scaling)


def inspect_foreign(loader: ForeignLoader) -> Inspection:
    """Describe a model that transformers computes; reads no weights."""
    checkpoint, spec = loader.checkpoint, loader.spec
    types = Counter(tensor.type_name for tensor in checkpoint.tensors.values())
    quantization = ", ".join(f"{name} ({count} tensors)" for name, count in types.most_common())
    counts = [(tensor.type_name, math.prod(tensor.shape)) for tensor in checkpoint.tensors.values()]
    return _inspection(
        checkpoint, spec, counts, quantization, 2 * spec.num_kv_heads * spec.head_dim, spec.rotary_scaling
    )


def _inspection(
    checkpoint: Checkpoint | ForeignCheckpoint,
    spec: ModelSpec | ForeignSpec,
    counts: Iterable[tuple[str, int]],
    quantization: str,
    kv_dim: int,
    rotary_scaling: str,
) -> Inspection:
    """
    Args:
        counts: of each tensor its type and number of values.
        kv_dim: values that a layer caches of a token.
    """
    weight_bytes = checkpoint.weight_bytes
    by_type: dict[str, int] = {}
    for type_name, count in counts:
        by_type[type_name] = by_type.get(type_name, 0) + count
    kv_bytes = spec.num_layers * kv_dim * KV_ELEMENT_BYTES
    contexts = [*(context for context in _CONTEXTS if context < spec.max_position), spec.max_position]
    tokenizer, chat_template = _text_parts(checkpoint)
    return Inspection(
        name=checkpoint.name,
        path=checkpoint.path,
        format=checkpoint.format,
        family=spec.family if isinstance(checkpoint, Checkpoint) else f"{spec.family}, through transformers",
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        quantization=quantization,
        parameters_by_type=dict(sorted(by_type.items(), key=lambda item: -item[1])),
        vocab_size=spec.vocab_size,
        max_position=spec.max_position,
        rotary_scaling=rotary_scaling,
        window=min((window for window in spec.windows if window is not None), default=None),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        tied_head=spec.tied_head,
        tokenizer=tokenizer,
        chat_template=chat_template,
        weight_bytes=weight_bytes,
        expanded_bytes=EXPANDED_WEIGHT_BYTES * checkpoint.parameters,
        kv_bytes_per_token=kv_bytes,
        memory=tuple(MemoryNeed(context=n, bytes=weight_bytes + n * kv_bytes) for n in contexts),
    )


def _text_parts(checkpoint: Checkpoint | ForeignCheckpoint) -> tuple[str | None, bool]:
    """Kind of the tokenizer, and whether there is a chat template."""
    if isinstance(checkpoint, Checkpoint) and checkpoint.gguf is not None:
        kind, pre = checkpoint.gguf.get("tokenizer.ggml.model"), checkpoint.gguf.get("tokenizer.ggml.pre")
        described = f"{kind} ({pre})" if pre is not None else str(kind)
        return (described if kind is not None else None), "tokenizer.chat_template" in checkpoint.gguf
    folder = checkpoint.path
    return _tokenizer_in(folder), (folder / "chat_template.jinja").exists() or _has_template(folder)


def _tokenizer_in(folder: Path) -> str | None:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            model = load_json_object(file).get("model")
        except ModelFormatError as error:
            return f"unreadable ({error})"
        return str(model.get("type", "unnamed")) if isinstance(model, dict) else "unnamed"
    others = {"tokenizer.model": "SentencePiece", "tekken.json": "tekken", "tiktoken.model": "tiktoken"}
    return next((kind for name, kind in others.items() if (folder / name).exists()), None)


def _has_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.exists() and load_json_object(file).get("chat_template") is not None
