"""What the server needs of an engine and of the model it serves (`aphrodite.engine.async_engine` has both)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aphrodite.chat.template import ChatTemplate
    from aphrodite.engine.embedding import EmbeddingOutput, EmbeddingParams
    from aphrodite.engine.loaded_adapters import LoadedAdapter, LoadedAdapters
    from aphrodite.engine.messages import EmbeddingInfo, EngineStats
    from aphrodite.outputs import RequestOutput
    from aphrodite.sampling.params import SamplingParams
    from aphrodite.tokenizer.tokenizer import Tokenizer


class ModelInfo(Protocol):
    """The served model as clients see it. `created` is in Unix seconds."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> Sequence[str]: ...
    @property
    def root(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def num_cache_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...
    @property
    def created(self) -> int: ...
    @property
    def sampling_defaults(self) -> SamplingParams: ...
    @property
    def embedding(self) -> EmbeddingInfo: ...


class Engine(Protocol):
    """Requests in, streams of pieces out. `dead` is set when the engine can serve no more."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat_template(self) -> ChatTemplate: ...
    @property
    def dead(self) -> asyncio.Event: ...
    @property
    def adapters(self) -> LoadedAdapters: ...

    async def load_adapter(self, name: str, path: str) -> LoadedAdapter:
        """Load an adapter that requests may name.

        Raises:
            InvalidRequestError, ConfigError, EngineDeadError: it cannot be loaded.
        """

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away, once the requests that use it have ended.

        Raises:
            InvalidRequestError, EngineDeadError: there is none of this name.
        """

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        progress: bool = False,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Stream a request's pieces; closing the iterator frees the request.

        Args:
            adapter: name of the one that answers; None is the model alone.
            progress: pieces without answers tell how much of the prompt is computed.

        Raises:
            InvalidRequestError, QueueFullError, EngineDeadError: with the first item where possible.
        """

    async def embed(
        self,
        prompt_token_ids: list[int],
        params: EmbeddingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> EmbeddingOutput:
        """One prompt's embedding; cancelling it frees the request.

        Raises:
            InvalidRequestError, QueueFullError, EngineDeadError, RequestFailedError: there is none.
        """

    async def check_health(self) -> None:
        """Go once through the engine loop, waiting without limit; raises `EngineDeadError` when it is gone."""

    async def close(self) -> None:
        """End the engine; requests that still run fail with `EngineDeadError`."""

    def stats(self) -> EngineStats:
        """Gauges and running totals as of the latest step."""
