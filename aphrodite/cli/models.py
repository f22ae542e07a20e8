"""`models inspect`: what a checkpoint is and what it needs."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aphrodite.cli.console import format_bytes, stdout
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig, Settings

if TYPE_CHECKING:
    from aphrodite.loading.checkpoint import Checkpoint

app = typer.Typer(name="models", help="Look at models.", no_args_is_help=True)

KV_ELEMENT_BYTES = 2  # float16, the default


@app.callback()
def _group() -> None:
    """Look at models."""


@app.command("inspect")
@with_options(EngineConfig)
def inspect(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, settings: Settings
) -> None:
    """Say what a checkpoint is: family, parameters, quantization, context, memory needed. Loads nothing."""
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.loading.checkpoint import open_checkpoint

    config, path = resolve_model(settings.engine)
    facts = describe_checkpoint(open_checkpoint(path, load_format=config.load_format))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = stdout()
    for name, value in _in_words(facts).items():
        console.print(f"{name:<14} {value}", soft_wrap=True)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of a checkpoint; sizes in bytes, lengths in tokens."""
    spec = checkpoint.spec
    parameters: Counter[str] = Counter()
    for name in checkpoint.weights:
        tensor = checkpoint.weights[name]
        parameters[tensor.qtype.name] += math.prod(tensor.shape)
    kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * KV_ELEMENT_BYTES
    return {
        "name": checkpoint.name,
        "family": spec.family,
        "parameters": sum(parameters.values()),
        "quantization": dict(parameters.most_common()),
        "weight_bytes": checkpoint.weight_bytes,
        "max_position": spec.max_position,
        "rotary_scaling": spec.rotary.scaling,
        "sliding_window": next((window for window in spec.windows if window is not None), None),
        "vocab_size": spec.vocab_size,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "tied_head": spec.tied_head,
        "kv_bytes_per_token": kv_bytes,
    }


def _in_words(facts: dict[str, Any]) -> dict[str, str]:
    total = facts["parameters"]
    quantization = ", ".join(f"{name} {count / total:.0%}" for name, count in facts["quantization"].items())
    context = facts["max_position"]
    kv_bytes = context * facts["kv_bytes_per_token"]
    window = f", sliding window of {facts['sliding_window']:,}" if facts["sliding_window"] else ""
    scaling = f", rotary scaling {facts['rotary_scaling']}" if facts["rotary_scaling"] != "none" else ""
    return {
        "Name": facts["name"],
        "Family": facts["family"],
        "Parameters": f"{total / 1e9:.2f} billion" if total >= 1e9 else f"{total / 1e6:.1f} million",
        "Quantization": f"{quantization} (share of parameters)",
        "Context": f"{context:,} tokens{scaling}{window}",
        "Shape": f"{facts['layers']} layers of {facts['hidden_size']}, {facts['heads']} heads,"
        f" {facts['kv_heads']} KV heads, vocabulary of {facts['vocab_size']:,}",
        "Memory": f"{format_bytes(facts['weight_bytes'])} for weights, and {format_bytes(facts['kv_bytes_per_token'])}"
        f" a token for the KV cache: {format_bytes(facts['weight_bytes'] + kv_bytes)} with one full context",
    }
