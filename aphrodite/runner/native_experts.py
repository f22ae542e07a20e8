"""Mixtures of experts as operations of the native library.

A layer is: the norm and the router's product of all tokens; `ROUTE`, which chooses and packs each expert's tokens; one
gated product and one linear one over all chosen experts, whose weights lie in stacks; their weighed sum. Experts that
every token goes to are ordinary products beside them.
"""

from __future__ import annotations

from aphrodite.kernels.cpu.program import MAX_CHOICES, TILE_ROWS, OpKind, RoutingDesc, RowSet, Scoring
from aphrodite.models.spec import ModelSpec, MoeSpec
from aphrodite.runner.native_compiler import GATES, Compiler, Packs, compile_norm

_SCORINGS = {
    "softmax": Scoring.SOFTMAX,
    "sigmoid": Scoring.SIGMOID,
    "softmax_of_chosen": Scoring.SOFTMAX_OF_CHOSEN,
}
_NONE = -1


def expert_names(moe: MoeSpec) -> list[str]:
    """A layer's matrices, and stacks of them, in the order in which a step reads them."""
    shared = ["shared_gate", "shared_up", "shared_down"] if moe.shared_intermediate_size else []
    routers = ["router", "shared_router"] if moe.shared_gate else ["router"]
    return [*routers, *shared, "expert_gate", "expert_up", "expert_down"]


def unknown_parts_of_experts(spec: ModelSpec) -> list[str]:
    """What the model's experts have and programs have not."""
    if spec.moe is None:
        return []
    unknown = [f"experts in {spec.block} blocks"] if spec.block != "pre_norm" else []
    return unknown + ([f"{spec.moe.top_k} experts a token"] if spec.moe.top_k > MAX_CHOICES else [])


def compile_experts(compiler: Compiler, spec: ModelSpec, moe: MoeSpec, layer: int, residual: int) -> None:
    """Adds the feed-forward block of a layer with experts to `residual`."""
    builder, prefix = compiler.builder, f"layers.{layer}."
    shared = [f"{prefix}shared_{part}.weight" for part in ("gate", "up")] if moe.shared_intermediate_size else []
    routers = [f"{prefix}{name}.weight" for name in (("router", "shared_router") if moe.shared_gate else ("router",))]
    packs = compiler.packs("normed", [*routers, *shared], spec.hidden_size)
    compile_norm(compiler, spec, residual, packs, f"{prefix}mlp_norm")
    routing = _compile_router(compiler, spec, moe, prefix, packs)
    pair, down = [f"{prefix}expert_{part}.weight" for part in ("gate", "up")], f"{prefix}expert_down.weight"
    rows = compiler.packs("rows of experts", pair, spec.hidden_size, RowSet.PAIRS)
    vector, kind = compiler.norm(spec, f"{prefix}mlp_norm")
    builder.add_op(
        OpKind.ROUTE,
        source=residual,
        packs=rows.numbers,
        layer=routing,
        vector=vector,
        window=rows.orders,
        flag=kind,
        value=spec.norm_eps,
    )
    inner = compiler.packs("gated rows of experts", [down], moe.intermediate_size, RowSet.PAIRS)
    gated = [compiler.weight(name, rows) for name in pair]
    builder.add_op(OpKind.EXPERT_GATED, weights=gated, packs=inner.numbers, flag=GATES[spec.activation])
    results = compiler.buffer("results of experts", moe.top_k * spec.hidden_size)
    builder.add_op(OpKind.EXPERT_LINEAR, output=results, weights=[compiler.weight(down, inner)])
    if moe.shared_gate:
        _compile_shared(compiler, spec, moe, prefix, packs, _shared_results(compiler, spec), accumulate=False)
    builder.add_op(OpKind.EXPERT_SUM, source=results, output=residual, layer=routing)
    if shared and not moe.shared_gate:
        _compile_shared(compiler, spec, moe, prefix, packs, residual, accumulate=True)


def _compile_router(compiler: Compiler, spec: ModelSpec, moe: MoeSpec, prefix: str, packs: Packs) -> int:
    """The router's product, the gate of the shared experts in a column behind it; returns how tokens choose."""
    gate = -(-moe.num_experts // TILE_ROWS) * TILE_ROWS
    logits = compiler.buffer("router", gate + 1)
    weights = [compiler.weight(f"{prefix}router.weight", packs)]
    if moe.shared_gate:
        weights.append(compiler.weight(f"{prefix}shared_router.weight", packs, gate))
    compiler.builder.add_op(OpKind.LINEAR, output=logits, weights=weights)
    return compiler.builder.add_routing(
        RoutingDesc(
            experts=moe.num_experts,
            choices=moe.top_k,
            scoring=_SCORINGS[moe.scoring],
            normalize=moe.normalize,
            groups=moe.num_groups,
            best_groups=moe.top_groups,
            pair_score=moe.group_score == "top2_sum",
            correction=compiler.vector(f"{prefix}router.correction") if moe.correction_bias else _NONE,
            logits=logits,
            shared=_shared_results(compiler, spec) if moe.shared_gate else _NONE,
            gate=gate,
            scale=moe.weight_scale,
        )
    )


def _shared_results(compiler: Compiler, spec: ModelSpec) -> int:
    return compiler.buffer("results of shared experts", spec.hidden_size)


def _compile_shared(
    compiler: Compiler,
    spec: ModelSpec,
    moe: MoeSpec,
    prefix: str,
    packs: Packs,
    output: int,
    *,
    accumulate: bool,
) -> None:
    """The experts that every token goes to."""
    down = f"{prefix}shared_down.weight"
    inner = compiler.packs("gated for shared experts", [down], moe.shared_intermediate_size)
    pair = [compiler.weight(f"{prefix}shared_{part}.weight", packs) for part in ("gate", "up")]
    compiler.builder.add_op(OpKind.GATED, weights=pair, packs=inner.numbers, flag=GATES[spec.activation])
    weights = [compiler.weight(down, inner)]
    compiler.builder.add_op(OpKind.LINEAR, output=output, weights=weights, flag=int(accumulate))
