"""Every setting of the engine and the server, once: type, default, bounds and help.

Command-line flags, `APHRODITE_*` variables, YAML keys, `config init` and the checks are all made from the
fields below. This module imports no torch and no YAML parser, so that help stays fast.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal

from aphrodite.chat.formats import ReasoningName, ToolFormat
from aphrodite.config_values import Kind, Setting, SettingMeta, check_value, parse_value
from aphrodite.errors import ConfigError, did_you_mean


def _setting(default: Any, help: str, group: str, **rest: Any) -> Any:
    meta = SettingMeta(help, group, **rest)
    return field(default=default, repr=not meta.secret, metadata={"setting": meta})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What is loaded and how it runs. Values are checked on construction (`ConfigError`).

    None means automatic wherever a field allows it. Sizes are bytes, lengths are tokens.
    """

    model: str | None = _setting(
        None,
        "GGUF file, safetensors directory, a name on the Hugging Face hub (ORG/NAME, ORG/NAME:Q4_K_M, "
        "ORG/NAME@REVISION), or nothing for the default model.",
        "Model",
        example="model.gguf",
    )
    served_model_name: tuple[str, ...] = _setting(
        (), "Names under which the API offers the model; the first is the one it reports.", "Model", example="writer"
    )
    load_format: Literal["auto", "gguf", "safetensors", "dummy"] = _setting(
        "auto", "Checkpoint format; `dummy` makes random weights from a config.json alone.", "Model"
    )
    tokenizer: str | None = _setting(
        None, "tokenizer.json, or a directory with one, instead of the model's own.", "Model", example="tokenizer.json"
    )
    chat_template: str | None = _setting(
        None,
        "Chat template instead of the model's own: a name of the library (`aphrodite templates ls`), or a Jinja file.",
        "Model", example="chatml",
    )  # fmt: skip
    generation_config: Literal["auto", "none"] = _setting(
        "auto",
        "Where sampling values come from that a request does not name: from what the model recommends "
        "(generation_config.json or GGUF metadata: temperature, top_p, top_k, min_p, repetition_penalty), or `none`.",
        "Model",
    )
    cache_dir: str | None = _setting(
        None,
        "Where fetched models are kept; default is ~/.cache/aphrodite (or below XDG_CACHE_HOME), and for models of the "
        "Hugging Face hub its own cache (HF_HOME).",
        "Model",
    )

    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "Where the model runs.", "Compute")
    executor: Literal["auto", "native", "triton", "torch"] = _setting(
        "auto",
        "Kernels: the native CPU library, Triton on a GPU, or torch operations on the CPU (portable and slower).",
        "Compute",
    )
    enable_graphs: bool = _setting(
        True, "Run a GPU's decode steps as captured graphs; without them every kernel is launched by itself.", "Compute"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Arithmetic type of dequantized layers; float32 is the exact reference mode.", "Compute"
    )
    quantization: Literal["none", "int4", "int8", "fp8", "bitsandbytes"] = _setting(
        "none",
        "Quantize a full-precision checkpoint's layers at load: int4 (groups of 128; on a CPU as Q4_1), int8 (on a CPU "
        "as Q8_0), and on GPUs fp8 (e4m3, whose products have twice the rate) and bitsandbytes (NF4).",
        "Compute",
    )
    activations: Literal["int16", "int8", "float32"] = _setting(
        "int16",
        "Activations of the native CPU kernels: int16 is near exact (mean logit error about 0.002), "
        "float32 exact and slower, int8 the fast mode (about 0.17).",
        "Compute",
    )
    threads: int | None = _setting(
        None, "CPU threads that compute; auto is one for each physical core that may be used.", "Compute", ge=1, le=1024
    )

    max_model_len: int | None = _setting(
        None, "Longest prompt and answer together; auto is what the model and the memory allow.", "Memory", ge=1,
        le=2**31 - 1, unit="tokens", example="32k (32,000) or 32K (32,768)",
    )  # fmt: skip
    gpu_memory_utilization: float = _setting(
        0.9, "Share of a GPU's memory to use for weights, KV cache and workspace together.", "Memory", ge=0.05, le=1.0
    )
    cpu_offload_gb: float = _setting(
        0.0,
        "GiB of a model's weights to keep in host memory and copy to the GPU in every step: for models larger than it.",
        "Memory", ge=0, le=65536,
    )  # fmt: skip
    kv_cache_memory: int | None = _setting(
        None, "Memory for the KV cache; auto is what is free on a GPU, and half of that on a CPU.", "Memory",
        ge=1, le=2**63 - 1, unit="bytes", example="4GiB",
    )  # fmt: skip
    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "float32", "fp8"] = _setting(
        "auto", "Type of the KV cache; fp8 (e4m3) is for GPUs and halves it at some cost in accuracy.", "Memory"
    )
    block_size: int = _setting(16, "Tokens in a block of the KV cache.", "Memory", choices=(8, 16, 32, 64))
    enable_prefix_caching: bool = _setting(
        True, "Keep the KV cache of earlier texts, so that a shared beginning is not computed again.", "Memory"
    )

    lora: tuple[str, ...] = _setting(
        (),
        "LoRA adapters as NAME=PATH, a PEFT folder or a GGUF adapter; requests choose one by its name as their model.",
        "Adapters", example="poet=adapters/poet",
    )  # fmt: skip
    enable_lora: bool = _setting(
        False, "Make room for adapters that are loaded later; --lora makes it, too.", "Adapters"
    )
    max_loras: int | None = _setting(
        None,
        "Different adapters that a step may be computed with; auto is one for each of --lora, from 4 to 8. Requests "
        "for more of them wait.",
        "Adapters", ge=1, le=64,
    )  # fmt: skip
    max_lora_rank: int | None = _setting(
        None, "Largest rank of an adapter; auto is that of those in --lora, and at least 16.", "Adapters", ge=1, le=128
    )

    max_num_seqs: int | None = _setting(
        None, "Most sequences that run at the same time; auto is 64 on a CPU, 256 on a GPU.", "Scheduling",
        ge=1, le=65536,
    )  # fmt: skip
    max_num_batched_tokens: int | None = _setting(
        None, "Most tokens computed in one step; auto is 512 on a CPU, 8192 on a GPU.", "Scheduling",
        ge=1, le=2**20, unit="tokens",
    )  # fmt: skip
    prompt_tokens_beside_answers: int | None = _setting(
        None,
        "Most tokens of prompts in a step that also goes on with answers, which wait for its end; auto is 128 on a CPU,"
        " and no limit of its own on a GPU.",
        "Scheduling", ge=1, le=2**20, unit="tokens",
    )  # fmt: skip
    scheduling_policy: Literal["fcfs", "priority"] = _setting(
        "fcfs", "Order of waiting requests: first come first served, or by their priority field.", "Scheduling"
    )
    async_depth: int | None = _setting(
        None, "Steps planned ahead of the device: 0 or 1; auto is 0 on a CPU, 1 on a GPU.", "Scheduling", ge=0, le=1
    )
    max_queued_requests: int = _setting(
        256, "Waiting requests beyond which a new one is refused (HTTP 429).", "Scheduling", ge=1, le=10**7
    )
    max_logprobs: int = _setting(
        20, "Most log-probabilities that a request may ask for at each token.", "Scheduling", ge=0, le=10**6
    )

    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least serious log shown.", "Logging")

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the HTTP server listens and whom it lets in. Checked on construction (`ConfigError`)."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every network of this machine.", "Server")
    port: int = _setting(2242, "Port to listen on; 0 picks a free one.", "Server", ge=0, le=65535)
    api_key: tuple[str, ...] = _setting(
        (), "Keys that clients must send (Bearer or X-API-Key); none lets everyone in.", "Server", secret=True
    )
    admin_key: tuple[str, ...] = _setting(
        (),
        "Keys that also open what changes the server: loading, unloading, fetching and removing models and adapters; "
        "none closes that to everyone.",
        "Server",
        secret=True,
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), "Host names to answer to, beside loopback and --host; * is any.", "Server", example="models.example.org"
    )
    cors_origins: tuple[str, ...] = _setting(
        (),
        "Web pages (origins) that may call the API from a browser; * is all.",
        "Server",
        example="http://localhost:8000",
    )
    root_path: str = _setting("", "Path prefix under which a proxy serves this server.", "Server", example="/llm")
    models_dir: str | None = _setting(
        None,
        "Folder of models: each GGUF file and each folder of a checkpoint in it is a model that requests may name. It "
        "is loaded when one does.",
        "Several models", example="models",
    )  # fmt: skip
    models_memory: int | None = _setting(
        None,
        "Memory for all models that are loaded at the same time; auto is what is free at the start. Models that nobody "
        "uses give way, the one first that was used least recently.",
        "Several models", ge=1, le=2**63 - 1, unit="bytes", example="20GiB",
    )  # fmt: skip
    models_max: int | None = _setting(
        None, "Most models that are loaded at the same time; auto is as many as fit.", "Several models", ge=1, le=1024
    )
    keep_alive: float | None = _setting(
        None,
        "Time without requests after which a model is unloaded; auto keeps it until its memory is needed.",
        "Several models", ge=0, le=86400 * 3650, unit="seconds", example="5m",
    )  # fmt: skip
    sampler_presets: str | None = _setting(
        None, "YAML file of sampler presets that requests may name, beside those that ship.", "Server",
        example="presets.yaml",
    )  # fmt: skip
    sampler_preset: str | None = _setting(
        None, "Preset of requests that name none (`aphrodite samplers presets` lists them).", "Server", example="story"
    )
    max_body_bytes: int = _setting(
        32 * 2**20, "Largest request body.", "Server", ge=1024, le=2**32, unit="bytes", example="32MiB"
    )
    response_store: int = _setting(
        64 * 2**20,
        "Memory for the latest answers of /v1/responses, which later requests may go on from; 0 keeps none.",
        "Server", ge=0, le=2**40, unit="bytes", example="64MiB",
    )  # fmt: skip
    shutdown_timeout: float = _setting(
        30.0, "Seconds that running requests get to finish after SIGTERM.", "Server", ge=0, le=86400, unit="seconds"
    )
    request_timeout: float | None = _setting(
        None, "Longest life of one generation in seconds, waiting included; auto is no limit.", "Server",
        ge=0.001, le=86400 * 30, unit="seconds",
    )  # fmt: skip
    ping_interval: float = _setting(
        10.0, "Seconds of silence after which a stream gets a comment line, so that proxies keep it.", "Server",
        ge=0.1, le=86400, unit="seconds",
    )  # fmt: skip
    write_timeout: float = _setting(
        60.0, "Seconds after which a client that does not read its stream counts as gone.", "Server",
        ge=0.1, le=86400, unit="seconds",
    )  # fmt: skip
    stream_resume_seconds: float = _setting(
        60.0, "Seconds that a stream asked for with `resumable` waits for a client that lost it; 0 keeps none.",
        "Server", ge=0, le=86400, unit="seconds",
    )  # fmt: skip
    health_timeout: float = _setting(
        10.0, "Seconds that the engine's loop may take to answer before /health says 503.", "Server",
        ge=0.1, le=86400, unit="seconds",
    )  # fmt: skip
    trust_request_chat_template: bool = _setting(
        False, "Accept a chat template inside a request (rendered in the sandbox).", "Server"
    )
    tool_parser: Literal["auto", "none", ToolFormat] = _setting(
        "auto",
        "How answers call tools: as the chat template asks for it, or by name; `none` leaves calls in the text.",
        "Server",
    )
    reasoning_parser: Literal["auto", "none", ReasoningName] = _setting(
        "auto",
        "How answers mark what the model thinks, which chat answers tell apart from their text: as the chat template "
        "has it, or by name; `none` leaves it in the text.",
        "Server",
    )
    log_requests: bool = _setting(False, "Log a line for each request; never its text.", "Logging")

    def __post_init__(self) -> None:
        _check_fields(self)


@cache
def settings_table() -> dict[str, Setting]:
    """All settings by name, in the order in which help shows them: by group."""
    rows = []
    for owner in (EngineConfig, ServerSettings):
        hints = typing.get_type_hints(owner)
        for entry in fields(owner):
            rows.append(_row(owner, entry.name, hints[entry.name], entry.default, entry.metadata["setting"]))
    groups = list(dict.fromkeys(row.group for row in rows))
    return {row.name: row for row in sorted(rows, key=lambda row: groups.index(row.group))}


def _row(owner: Any, name: str, hint: Any, default: Any, meta: SettingMeta) -> Setting:
    if default is MISSING:
        raise TypeError(f"setting {name} has no default")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (base,) = (option for option in options if option is not type(None))
    origin = typing.get_origin(base)
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str", Literal: "choice", tuple: "list"}
    choices = typing.get_args(base) if origin is Literal else meta.choices
    return Setting(name, owner, kinds[origin or base], type(None) in options, default, choices, meta)


def _check_fields(config: EngineConfig | ServerSettings) -> None:
    for setting in settings_table().values():
        if setting.owner is type(config):
            check_value(setting, getattr(config, setting.name))


def make_engine_config(settings: Mapping[str, object]) -> EngineConfig:
    """An `EngineConfig` from keyword arguments of the Python API; texts such as "32k" are read as flags are.

    Raises:
        ConfigError: an unknown or wrong name or value.
    """
    known = [name for name, row in settings_table().items() if row.owner is EngineConfig]
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{name} is not an engine setting.{did_you_mean(name, known)}")
        values[name] = parse_value(settings_table()[name], value, name)
    return EngineConfig(**values)
