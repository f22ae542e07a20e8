"""Embeddings on the front end's side: what a request may ask for, and the last step from pooled states to a vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aphrodite.core.plan import Pooling
from aphrodite.engine.messages import EmbeddingInfo
from aphrodite.errors import InvalidRequestError, RequestFailedError
from aphrodite.outputs import RequestOutput
from aphrodite.sampling.params import SamplingParams

PROMPT_ONLY = SamplingParams(max_tokens=0)  # of a request that answers nothing


@dataclass(frozen=True, slots=True)
class EmbeddingParams:
    """How an embedding is made; None is the model's own way.

    Attributes:
        pooling: of the hidden states behind the final norm.
        normalize: to length 1.
        dimensions: keep the first so many values (Matryoshka, arXiv 2205.13147), before normalising.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One text's embedding: `values` is `[dimensions]` float32."""

    values: np.ndarray
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    queue_seconds: float | None = None


def check_embedding(params: EmbeddingParams, info: EmbeddingInfo) -> None:
    """Refuse what the model cannot give.

    Raises:
        InvalidRequestError: it makes no embeddings, or none of so many dimensions.
    """
    if info.declined is not None:
        raise InvalidRequestError(f"This model makes no embeddings: {info.declined}.", param="model")
    if params.dimensions is not None and not 1 <= params.dimensions <= info.size:
        raise InvalidRequestError(
            f"`dimensions` must be 1 to {info.size}, which this model's embeddings have, not {params.dimensions}",
            param="dimensions",
        )


def embedding_of(output: RequestOutput, params: EmbeddingParams, info: EmbeddingInfo) -> EmbeddingOutput:
    """From a finished request's pooled states.

    Raises:
        RequestFailedError: there are none, for the engine could not finish the request.
    """
    if output.embedding is None:
        raise RequestFailedError(output.outputs[0].error or "the engine ended the request")
    values = _values(output.embedding, params, info)
    return EmbeddingOutput(values, output.prompt_token_ids, output.num_cached_tokens, output.queue_seconds)


def _values(pooled: bytes, params: EmbeddingParams, info: EmbeddingInfo) -> np.ndarray:
    """`[dimensions]` float32; a vector of zeros stays what it is."""
    values = np.frombuffer(pooled, np.float32)[: params.dimensions].astype(np.float64)
    if info.normalize if params.normalize is None else params.normalize:
        length = float(np.linalg.norm(values))
        values = values / length if length else values
    return values.astype(np.float32)
