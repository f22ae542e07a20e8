"""The typed messages between front end and engine process (msgpack over a private Unix socket).

Everything that crosses is one of the tagged structs below; a message that does not decode to one of
them is refused by msgspec before any code sees it.
"""

from __future__ import annotations

import msgspec

from aphrodite.core.plan import Pooling
from aphrodite.core.request import RequestUpdate
from aphrodite.sampling.params import SamplingParams


class AddRequest(msgspec.Struct, frozen=True, tag="add", array_like=True):
    """Answer one prompt `len(request_ids)` times; the answers share the prompt's KV blocks."""

    request_ids: list[str]
    seeds: list[int]  # one 64-bit unsigned seed an answer
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    pooling: Pooling | None = None  # no answer: the prompt's embedding
    progress: bool = False  # updates tell how much of the prompt is computed
    adapter: int | None = None  # number of the adapter that computes it


class AbortRequests(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    request_ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """Answered from inside the engine loop: a hung engine does not answer."""

    number: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset", array_like=True):
    pass


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter", array_like=True):
    """Answered by `AdapterNews`."""

    number: int  # new with every adapter
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter", array_like=True):
    """Answered by `AdapterNews` when the requests that use it have ended."""

    number: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    pass


ToEngine = AddRequest | AbortRequests | Ping | ResetPrefixCache | LoadAdapter | UnloadAdapter | Shutdown


class Progress(msgspec.Struct, frozen=True, tag="progress", array_like=True):
    """Loading: `done` of `total` bytes of weights are in place."""

    label: str
    done: int
    total: int


class EmbeddingInfo(msgspec.Struct, frozen=True, array_like=True):
    """How the model makes embeddings."""

    size: int  # values of one
    pooling: Pooling  # where a request names none
    normalize: bool  # the same, to length 1
    declined: str | None  # why it makes none


class AdapterInfo(msgspec.Struct, frozen=True, array_like=True):
    """A loaded adapter."""

    rank: int  # the largest of its modules'
    modules: int  # weights that it adds to
    nbytes: int  # as it is stored


class EngineInfo(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """What a loaded engine says of itself, once.

    Attributes:
        expert_bytes: of `weight_bytes`, those of experts among which tokens choose.
        expert_share: what one token reads of them.
    """

    model: str
    family: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    eos_token_ids: list[int]
    weight_bytes: int
    expert_bytes: int
    expert_share: float
    kv_bytes_per_block: int
    memory_plan: list[str]
    kernels: dict[str, str]
    sampling_defaults: SamplingParams  # of requests that name no values
    embedding: EmbeddingInfo
    adapters: list[AdapterInfo] = []  # of the setting `lora`, numbered in its order
    max_loras: int = 0  # different adapters in a step; 0: none can be loaded


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Counters and gauges after a step. Times are running medians over the latest steps."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of blocks in use by requests, 0..1
    prefix_queries: int = 0  # prompt tokens looked up, total
    prefix_hits: int = 0  # of those found, total
    num_preemptions: int = 0  # total
    num_steps: int = 0  # total
    host_ms: float = 0.0  # scheduling, input preparation, sampling, bookkeeping of one step
    forward_ms: float = 0.0  # model forward of one step


class StepOutputs(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """What one engine step brought, for all requests together."""

    updates: list[RequestUpdate]
    stats: EngineStats


class AdapterNews(msgspec.Struct, frozen=True, tag="adapter", array_like=True):
    """An adapter was loaded, could not be (`error`), or is gone (neither)."""

    number: int
    adapter: AdapterInfo | None = None
    error: str | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    number: int


class Fatal(msgspec.Struct, frozen=True, tag="fatal", array_like=True):
    """The engine cannot start or go on; `message` is fit for a user."""

    message: str


FromEngine = Progress | EngineInfo | StepOutputs | AdapterNews | Pong | Fatal
