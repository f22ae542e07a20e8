"""Aphrodite Engine. The public names are loaded on first use, so that `import aphrodite` stays instant."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aphrodite.client import AsyncOpenAI, OpenAI
    from aphrodite.config import EngineConfig
    from aphrodite.engine.async_engine import AsyncEngine
    from aphrodite.engine.embedding import EmbeddingOutput, EmbeddingParams
    from aphrodite.llm import LLM
    from aphrodite.outputs import CompletionOutput, RequestOutput
    from aphrodite.sampling.params import SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncOpenAI",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingParams",
    "EngineConfig",
    "OpenAI",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "aphrodite.engine.async_engine",
    "AsyncOpenAI": "aphrodite.client",
    "CompletionOutput": "aphrodite.outputs",
    "EmbeddingOutput": "aphrodite.engine.embedding",
    "EmbeddingParams": "aphrodite.engine.embedding",
    "EngineConfig": "aphrodite.config",
    "LLM": "aphrodite.llm",
    "OpenAI": "aphrodite.client",
    "RequestOutput": "aphrodite.outputs",
    "SamplingParams": "aphrodite.sampling.params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("aphrodite-engine")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
