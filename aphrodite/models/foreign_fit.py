"""Whether a model of transformers fits this engine's attention: what its class, its modules and its calls tell.

Every answer is a reason against it, for people, or None. What none of them can see is left to the comparison of logits
(`runner/transformers_executor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from aphrodite.models.shape import ForeignSpec

# Rotary embeddings whose angles depend on the longest text of a step, so a request's tokens on its neighbours.
_CHANGING_ROTARY = ("dynamic", "longrope")
_LAYER_KINDS = {"full_attention": False, "sliding_attention": True, "attention": False}  # whether it has a window


class AttentionCall(NamedTuple):
    """What a layer of transformers asks of attention; tensors are `[1, heads, T, head_dim]`."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    options: Mapping[str, Any]


def class_misfit(model_class: Any, config: Any) -> str | None:
    """What the class and the configuration tell."""
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, and text is served by decoders alone"
    if getattr(model_class, "_is_stateful", False):
        return "its layers keep other state than keys and values (as state-space models do)"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "its attention in transformers cannot be replaced"
    text = config.get_text_config()
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(text, name, None), int):
            return f"its configuration has no {name}"
    if _max_position(text) is None:
        return "its configuration does not say how long a context may be"
    other = next((kind for kind in getattr(text, "layer_types", None) or () if kind not in _LAYER_KINDS), None)
    if other is not None:
        return f"it has layers of {other!r}, which are not served"
    return None


def module_misfit(module: nn.Module) -> str | None:
    """What the modules of a model tell."""
    for child in module.modules():
        if "Indexer" in type(child).__name__:
            return "its attention picks keys by an index of its own"
        kinds = getattr(child, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else (kinds,):
            if kind in _CHANGING_ROTARY:
                return f"its {kind} rotary scaling would let a text depend on those beside it"
    return None


def attention_misfit(config: Any, calls: Sequence[AttentionCall]) -> str | None:
    """What one forward pass tells.

    Args:
        calls: of attention, in order.
    """
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    if len(calls) != num_layers or len({call.module for call in calls}) != num_layers:
        return f"{len(calls)} calls of attention in {num_layers} layers: some have none, or attention of another kind"
    first = calls[0]
    for call in calls:
        if (reason := _call_misfit(call)) is not None:
            return reason
        if _heads(call) != _heads(first) or _scale(call) != _scale(first) or _softcap(call) != _softcap(first):
            return "its layers have attention of different shapes or scales"
    return _window_misfit(text, [_window(call) for call in calls])


def _window_misfit(config: Any, windows: Sequence[int | None]) -> str | None:
    """Windows reach attention by its arguments here, since a step has no mask: none may be missing there."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) == len(windows):
        fits = all(_LAYER_KINDS[kind] == (window is not None) for kind, window in zip(kinds, windows, strict=True))
    else:
        wanted = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        fits = not wanted or any(window is not None for window in windows)
    return None if fits else "its sliding windows do not reach the attention function"


def _call_misfit(call: AttentionCall) -> str | None:
    tokens = call.query.shape[2]
    if call.key.shape != call.value.shape or call.query.shape[3] != call.key.shape[3] or call.key.shape[2] != tokens:
        return "its keys and values differ in size from each other or from its queries"
    if call.query.shape[1] % call.key.shape[1]:
        return "its query heads are no multiple of its KV heads"
    if call.mask is not None:
        return "it makes attention masks of its own"
    if call.options.get("s_aux") is not None:
        return "its attention has sinks"
    if not call.options.get("is_causal", getattr(call.module, "is_causal", True)):
        return "its attention looks ahead"
    return None


def _heads(call: AttentionCall) -> tuple[int, int, int]:
    return call.query.shape[1], call.key.shape[1], call.query.shape[3]


def _scale(call: AttentionCall) -> float:
    return float(call.query.shape[3] ** -0.5 if call.scaling is None else call.scaling)


def _softcap(call: AttentionCall) -> float:
    return float(call.options.get("softcap") or 0.0)


def _window(call: AttentionCall) -> int | None:
    return call.options.get("sliding_window") or None


def spec_of(config: Any, calls: Sequence[AttentionCall], vocab_size: int) -> ForeignSpec:
    """The model in the engine's terms; nothing was found against it."""
    text = config.get_text_config()
    num_heads, num_kv_heads, head_dim = _heads(calls[0])
    return ForeignSpec(
        family=config.model_type,
        vocab_size=vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=max(getattr(text, "intermediate_size", None) or 0, 4 * text.hidden_size),
        num_layers=len(calls),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=cast(int, _max_position(text)),
        windows=tuple(_window(call) for call in calls),
        query_scale=_scale(calls[0]),
        softcap=_softcap(calls[0]),
        rotary_scaling=_rotary_scaling(text),
        tied_head=bool(getattr(text, "tie_word_embeddings", False)),
    )


def _rotary_scaling(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None)
    kind = parameters.get("rope_type", "default") if isinstance(parameters, Mapping) else "default"
    return "none" if kind == "default" else str(kind)


def _max_position(config: Any) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
