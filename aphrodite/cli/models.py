"""`models inspect`: what a checkpoint is and what it needs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from aphrodite.cli.console import format_bytes, stdout
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig, Settings

if TYPE_CHECKING:
    from aphrodite.loading.inspect import Inspection

app = typer.Typer(name="models", help="Look at models.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at models."""


# Of the engine's settings only these say which checkpoint is meant.
_OTHERS = tuple(
    entry.name for entry in dataclasses.fields(EngineConfig) if entry.name not in ("model", "load_format", "cache_dir")
)


@app.command("inspect")
@with_options(EngineConfig, skip=_OTHERS)
def inspect(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, settings: Settings
) -> None:
    """Say what a checkpoint is: family, parameters, quantization, context, memory needed. Loads nothing."""
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.loading.inspect import inspect as inspect_checkpoint

    config, path = resolve_model(settings.engine)
    facts = inspect_checkpoint(path, load_format=config.load_format)
    if as_json:
        print(json.dumps(dataclasses.asdict(facts), indent=2, default=str))
        return
    console = stdout()
    for name, value in _in_words(facts).items():
        console.print(f"{name:<14} {value}", soft_wrap=True)


def _in_words(facts: Inspection) -> dict[str, str]:
    count = facts.parameters
    window = f", sliding window of {facts.window:,}" if facts.window is not None else ""
    expanded = (
        f"; {format_bytes(facts.expanded_bytes)} where they are expanded to 16 bits for want of a kernel"
        if facts.weight_bytes < facts.expanded_bytes
        else ""
    )
    scaling = f", rotary scaling {facts.rotary_scaling}" if facts.rotary_scaling != "none" else ""
    return {
        "Name": facts.name,
        "File": f"{facts.path} ({facts.format})",
        "Family": f"{facts.family} ({facts.architecture})",
        "Parameters": f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million",
        "Quantization": facts.quantization,
        "Context": f"{facts.max_position:,} tokens{scaling}{window}",
        "Shape": f"{facts.num_layers} layers of {facts.hidden_size}, {facts.num_heads} heads of {facts.head_dim},"
        f" {facts.num_kv_heads} KV heads, vocabulary of {facts.vocab_size:,}",
        "Tokenizer": facts.tokenizer or "none; name one with --tokenizer",
        "Chat template": "yes" if facts.chat_template else "none; name one with --chat-template",
        "Weights": format_bytes(facts.weight_bytes) + expanded,
        "KV cache": f"{format_bytes(facts.kv_bytes_per_token)} a token",
        "Memory": ", ".join(f"{format_bytes(need.bytes)} with {need.context:,} tokens" for need in facts.memory),
    }
