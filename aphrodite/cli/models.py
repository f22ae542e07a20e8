"""`models`: what a checkpoint is and needs, and the cache of models fetched from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from typing import TYPE_CHECKING, Annotated

import typer

from aphrodite.cli.console import format_bytes, stdout
from aphrodite.cli.help import Commands
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig
from aphrodite.errors import ConfigError
from aphrodite.settings import Settings

if TYPE_CHECKING:
    from aphrodite.loading.hub import ModelName
    from aphrodite.loading.inspect import Inspection
    from aphrodite.loading.lora import AdapterFile

app = Commands(name="models", help="Look at models, fetch and remove them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at models, fetch and remove them."""


def _others(*wanted: str) -> tuple[str, ...]:
    """The engine's settings that a command does not take."""
    return tuple(entry.name for entry in dataclasses.fields(EngineConfig) if entry.name not in wanted)


_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="ORG/NAME, ORG/NAME:Q4_K_M or ORG/NAME@REVISION.")]


@app.command("ls")
@with_options(EngineConfig, skip=_others("cache_dir"))
def list_models(*, as_json: _Json = False, settings: Settings) -> None:
    """List the models in the cache: names to run them by, formats, sizes, when they were last used."""
    from aphrodite.loading.model_cache import cached_models, hub_cache

    cache = hub_cache(settings.engine.cache_dir)
    models = cached_models(cache)
    if as_json:
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=2, default=str))
        return
    console = stdout()
    if not models:
        console.print(f"No models in {cache}. Fetch one: aphrodite models pull ORG/NAME", soft_wrap=True)
        return
    width = max(len(model.name) for model in models)
    console.print(f"{'NAME':<{width}}  {'FORMAT':<11}  {'SIZE':>9}  LAST USED", soft_wrap=True)
    now = time.time()
    for model in models:
        size, used = format_bytes(model.size), _ago(now - model.last_used)
        console.print(f"{model.name:<{width}}  {model.format:<11}  {size:>9}  {used}", soft_wrap=True)


@app.command("pull")
@with_options(EngineConfig, skip=_others("cache_dir", "load_format", "device", "log_level"))
def pull(name: _Name, *, settings: Settings) -> None:
    """Fetch a model from the Hugging Face hub into the cache; an interrupted download goes on where it was.

    Of several GGUF files that with the best balance of quality and size is chosen which fits into memory, unless one is
    named. HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured.
    """
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.logs import configure_logging

    configure_logging(settings.engine.log_level)
    _parse(name)
    _, path = resolve_model(dataclasses.replace(settings.engine, model=name))
    print(path)


@app.command("rm")
@with_options(EngineConfig, skip=_others("cache_dir"))
def remove_model(
    name: _Name,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    settings: Settings,
) -> None:
    """Remove a model from the cache: ORG/NAME with all its files, ORG/NAME:Q4_K_M or ORG/NAME@REVISION alone."""
    from aphrodite.loading.model_cache import hub_cache, plan_removal, remove

    parsed = _parse(name)
    cache = hub_cache(settings.engine.cache_dir)
    removal = plan_removal(cache, parsed.repo, variant=parsed.variant, revision=parsed.revision)
    words = f"{', '.join(removal.names)} ({format_bytes(removal.size)})"
    if not yes:
        typer.confirm(f"Remove {words} from {cache}?", abort=True)
    remove(removal)
    stdout().print(f"Removed {words}.", soft_wrap=True)


def _parse(name: str) -> ModelName:
    from aphrodite.loading.hub import parse_name

    parsed = parse_name(name)
    if parsed is None:
        raise ConfigError(f"{name!r} is not the name of a model on the Hugging Face hub, as ORG/NAME is")
    return parsed


@app.command("inspect")
@with_options(EngineConfig, skip=_others("model", "load_format", "cache_dir"))
def inspect(*, as_json: _Json = False, settings: Settings) -> None:
    """Say what a checkpoint or a LoRA adapter is, and the memory that it needs. Loads and fetches nothing."""
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.loading.inspect import inspect as inspect_checkpoint
    from aphrodite.loading.lora import is_adapter, open_adapter

    config, path = resolve_model(settings.engine, allow_download=False)
    if is_adapter(path):
        _show_adapter(open_adapter(path), as_json=as_json)
        return
    facts = inspect_checkpoint(path, load_format=config.load_format)
    if as_json:
        print(json.dumps(dataclasses.asdict(facts), indent=2, default=str))
        return
    console = stdout()
    for name, value in _in_words(facts).items():
        console.print(f"{name:<14} {value}", soft_wrap=True)


def _show_adapter(adapter: AdapterFile, *, as_json: bool) -> None:
    ranks = sorted({a.shape[0] for a, _ in adapter.matrices.values()})
    kinds = sorted({name.rpartition(".")[2] for name in adapter.matrices})
    scales = sorted(set(adapter.scales.values()))
    facts = {
        "File": f"{adapter.path} (LoRA adapter, {'GGUF' if adapter.gguf else 'PEFT'})",
        "Base": adapter.base or "not named",
        "Modules": f"{len(adapter.matrices)}: {', '.join(kinds)}",
        "Rank": ", ".join(map(str, ranks)),
        "Scale": ", ".join(f"{scale:.4g}" for scale in scales[:8]),
        "Weights": format_bytes(adapter.nbytes),
    }
    if as_json:
        print(json.dumps({name.lower(): value for name, value in facts.items()}, indent=2))
        return
    for name, value in facts.items():
        stdout().print(f"{name:<14} {value}", soft_wrap=True)


def _in_words(facts: Inspection) -> dict[str, str]:
    count = facts.parameters
    window = f", sliding window of {facts.window:,}" if facts.window is not None else ""
    expanded = (
        f"; {format_bytes(facts.expanded_bytes)} where they are expanded to 16 bits for want of a kernel"
        if facts.weight_bytes < facts.expanded_bytes
        else ""
    )
    chosen = f"none; aphrodite templates show --model {shlex.quote(str(facts.path))} shows which of the library is used"
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
        "Chat template": "its own" if facts.chat_template else chosen,
        "Weights": format_bytes(facts.weight_bytes) + expanded,
        "KV cache": f"{format_bytes(facts.kv_bytes_per_token)} a token",
        "Memory": ", ".join(f"{format_bytes(need.bytes)} with {need.context:,} tokens" for need in facts.memory),
    }


def _ago(seconds: float) -> str:
    """A duration that ends now, for people."""
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now"
