"""What families of mixtures of experts share: reading a `MoeSpec` out of config.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.common import MAX_WIDTH
from aphrodite.models.spec import MoeSpec, Scoring
from aphrodite.quantization.types import RawTensor

MAX_EXPERTS = 1 << 12


def moe_from_config(
    config: ConfigReader,
    *,
    count: str = "num_experts",
    intermediate: str = "intermediate_size",
    scoring: Scoring = "softmax",
    normalize: bool = False,
    dense_layers: tuple[int, ...] = (),
) -> MoeSpec:
    """The experts that config.json's common keys describe.

    Args:
        count, intermediate: keys of the number of experts (transformers 5 writes `num_local_experts`) and of an
            expert's width.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    experts = config.read(count if config.has(count) else "num_local_experts", int, low=1, high=MAX_EXPERTS)
    return MoeSpec(
        num_experts=experts,
        top_k=config.read("num_experts_per_tok", int, low=1, high=experts),
        intermediate_size=config.read(intermediate, int, low=1, high=MAX_WIDTH),
        scoring=scoring,
        normalize=normalize,
        dense_layers=dense_layers,
    )


def moe_from_gguf(
    config: ConfigReader,
    tensors: Mapping[str, RawTensor],
    *,
    scoring: Scoring = "softmax",
    normalize: bool = False,
) -> MoeSpec:
    """The experts that GGUF's common keys describe; what has no key shows in the tensors.

    Raises:
        ModelFormatError: a value is missing, mistyped, out of bounds or contradicts another.
    """
    experts = config.read("expert_count", int, low=1, high=MAX_EXPERTS)
    layers = config.read("block_count", int, low=1)
    down = "ffn_down.0.weight" if has_experts_apart(tensors) else "ffn_down_exps.weight"
    sparse = [layer for layer in range(layers) if f"blk.{layer}.{down}" in tensors]
    if not sparse:
        raise config.wrong("tensor blk.0.ffn_down_exps.weight", "present (the experts in one tensor)", None)
    prefix = f"blk.{sparse[0]}."
    shared = tensors.get(prefix + "ffn_down_shexp.weight")
    return MoeSpec(
        num_experts=experts,
        top_k=config.read("expert_used_count", int, low=1, high=experts),
        intermediate_size=tensors[prefix + down].shape[-1],
        scoring=scoring,
        normalize=normalize,
        dense_layers=tuple(layer for layer in range(layers) if layer not in sparse),
        shared_intermediate_size=0 if shared is None else shared.shape[-1],
        shared_gate=prefix + "ffn_gate_inp_shexp.weight" in tensors,
        router_bias=prefix + "ffn_gate_inp.bias" in tensors,
        expert_bias=prefix + "ffn_down_exps.bias" in tensors,
    )


def has_experts_apart(tensors: Mapping[str, RawTensor]) -> bool:
    """Whether a GGUF file keeps each expert in tensors of its own, as the first ones of Mixtral do."""
    return "blk.0.ffn_down.0.weight" in tensors
