"""What a scheduler is told once (sizes, rules) and what it tells about itself."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aphrodite.core.request import Request
from aphrodite.errors import ConfigError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes and rules of a scheduler.

    Raises:
        ConfigError: a number is out of range.
    """

    num_blocks: int
    max_num_seqs: int  # rows of the runner
    max_num_batched_tokens: int  # the most a step computes
    max_model_len: int  # prompt and output tokens of one request
    block_size: int = 16
    enable_prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    eos_token_ids: frozenset[int] = frozenset()
    max_queued_requests: int | None = None  # beyond those for which a row is free; None: no limit
    prompt_tokens_beside_answers: int | None = None  # the most in a step that goes on with an answer; None: no limit
    prompt_logprobs_chunk: int = 128  # prompt tokens a step for requests that want log-probabilities of them
    max_loras: int = 0  # different adapters in a step

    def __post_init__(self) -> None:
        sizes = ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
        for name in (*sizes, "prompt_logprobs_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        beside = self.prompt_tokens_beside_answers
        if beside is not None and beside < 1:
            raise ConfigError(f"prompt_tokens_beside_answers must be at least 1, got {beside}")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests must be at least 0, got {self.max_queued_requests}")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f'policy must be "fcfs" or "priority", got {self.policy!r}')

    @property
    def capacity(self) -> int:
        """Tokens that one request may have at most: the context, or the whole KV cache if that is smaller."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def measure(self, request: Request) -> tuple[array[int], int]:
        """A request's prompt as int32, and the number of tokens at which it ends with "length".

        Raises:
            InvalidRequestError: the request could never run, even alone.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens; it needs at least one", param="prompt")
        tokens = token_array(prompt, "prompt")
        max_tokens = request.params.max_tokens
        needed = len(prompt) + (max_tokens != 0)
        if needed > self.capacity:
            if self.capacity == self.max_model_len:
                why = f"the context length is {self.max_model_len}; shorten the prompt"
            else:
                why = (
                    f"the KV cache holds {self.capacity} ({self.num_blocks} blocks of {self.block_size});"
                    " shorten the prompt or enlarge the KV cache"
                )
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens and needs room for {needed}, but {why}",
                param="prompt",
                code="context_length_exceeded",
            )
        return tokens, self.capacity if max_tokens is None else min(self.capacity, len(prompt) + max_tokens)


def token_array(token_ids: list[int], name: str) -> array[int]:
    """At least one token id as int32; `name` says in errors which field brought them.

    Raises:
        InvalidRequestError: one is negative, or no 32-bit integer.
    """
    try:
        tokens = array("i", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidRequestError(f"a token id of `{name}` is not a 32-bit integer: {error}", param=name) from error
    lowest = min(token_ids)  # of the list, whose numbers are objects already
    if lowest < 0:
        raise InvalidRequestError(f"`{name}` holds the token id {lowest}, which is negative", param=name)
    return tokens


class SchedulerStats(NamedTuple):
    """A snapshot for metrics; counters run from the scheduler's start."""

    num_waiting: int
    num_running: int
    kv_usage: float  # share of blocks that block tables hold, 0 to 1
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of these, tokens found
    num_preemptions: int
