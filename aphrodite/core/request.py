"""A request as the scheduler sees it, and what the scheduler says about it after a step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from aphrodite.core.plan import NO_ADAPTER, Pooling, RowStep, TokenLogprobs, TokenTrace
from aphrodite.outputs import FinishReason
from aphrodite.sampling.params import SamplingParams


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = auto()  # has neither row nor blocks
    RUNNING = auto()  # has a row and blocks
    PREEMPTED = auto()  # keeps its row, gave its blocks back, waits to compute again
    ENDING = auto()  # keeps its row, gave its blocks back; its last token is in flight
    FINISHED = auto()


class RequestUpdate(NamedTuple):
    """What became known of a request: new tokens, or its end, or both."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one a new token, if asked for
    # The next entries, in order, for prompt tokens 1, 2, ... (the first has no probability), if asked for.
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id that ended it, or a name; None: an end-of-sequence token
    num_cached_tokens: int = 0  # prompt tokens whose KV was already there
    error: str | None = None  # with finish_reason "error"
    traces: list[TokenTrace] | None = None  # one a new token, if asked for
    warning: str | None = None  # what the guard could not keep out of the answer
    queue_seconds: float | None = None  # with a request's first news: from its coming to its first step
    embedding: bytes | None = None  # [hidden_size] float32 as they lie in memory, if asked for, with the end
    num_computed: int = 0  # prompt tokens computed or found so far, if asked for, while there is no token yet


class OutputToken(NamedTuple):
    """A sampled token and what was asked for beside it."""

    token_id: int
    logprobs: TokenLogprobs | None
    trace: TokenTrace | None


class Rewind(NamedTuple):
    """Take the answer back to `num_tokens` tokens."""

    num_tokens: int
    barred: list[int]  # not to be chosen as the next token; empty: what was barred there may be chosen again


class TokenGuard(Protocol):
    """Looks at an answer's tokens before they leave, and may hold them back or have the answer go back.

    Attributes:
        warning: what the guard could not keep out of the answer, once there is something.
    """

    @property
    def warning(self) -> str | None: ...

    def push(
        self, token: OutputToken, finish_reason: FinishReason | None, *, complete: bool = False
    ) -> list[OutputToken] | Rewind:
        """Take the next token; returns those that may leave now. All held ones leave with the one that ends it.

        Args:
            complete: it ends the answer and is part of it: its grammar allows no more.
        """

    def relent(self) -> Rewind | None:
        """The next token cannot be chosen; None if nothing that the guard barred can be the reason."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to extend: what was asked for, and how far it is.

    Every position of `tokens` has to be *computed* (its KV written) before the next can be sampled. Counters
    that a plan moves (`num_computed`, `num_pending`) include steps in flight; `num_committed` does not.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # 64 bits, unsigned
    priority: int = 0  # lower runs sooner, under policy "priority"
    cache_salt: bytes | None = None  # only requests with equal salts share blocks
    adapter: int | None = None  # number of the adapter that computes it; None: the model alone
    guard: TokenGuard | None = None
    negative_prompt_ids: list[int] | None = None  # its tokens are chosen with guidance; see `core/guidance.py`
    pooling: Pooling | None = None  # of a request that only computes its prompt: what makes its embedding
    tells_progress: bool = False  # of computing its prompt, after each step of it

    # Set by the scheduler when the request is added.
    tokens: array[int] = field(init=False)  # int32, known ones: prompt and output
    max_total: int = field(init=False, default=0)  # prompt and output tokens at which it ends with "length"
    ending_tokens: frozenset[int] = field(init=False, default=frozenset())  # that may end it; see `core/finish.py`
    plain: bool = field(init=False, default=False)  # its tokens need nothing beyond being appended
    key: tuple[int, int] = field(init=False, default=(0, 0))  # order of service: (priority, arrival)
    group: ForkGroup | None = field(init=False, default=None)
    shadow: Request | None = field(init=False, default=None)  # the sequence that guides it
    owner: Request | None = field(init=False, default=None)  # whose shadow this is

    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    row: int | None = field(init=False, default=None)  # from the first step until the last one has come back
    adapter_slot: int = field(init=False, default=NO_ADAPTER)  # from the first step to the end
    blocks: list[int] = field(init=False, default_factory=list)  # the block table
    untold: bool = field(init=False, default=True)  # guided ones: the runner has not heard of the whole block table
    digests: list[bytes] = field(init=False, default_factory=list)  # of its full blocks with known tokens
    num_registered: int = field(init=False, default=0)  # leading blocks of the table that the cache was told of
    registers: bool = field(init=False, default=True)  # False: its KV is older than the last reset of the cache

    num_computed: int = field(init=False, default=0)  # leading positions computed, by plans made so far
    num_committed: int = field(init=False, default=0)  # the same, by plans whose results have arrived
    num_pending: int = field(init=False, default=0)  # tokens being sampled by plans in flight
    num_inflight: int = field(init=False, default=0)  # plans in flight that hold a step of this request

    num_cached_tokens: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    num_rewinds: int = field(init=False, default=0)
    rewind: Rewind | None = field(init=False, default=None)  # the runner has yet to hear of it
    num_prompt_logprobs: int = field(init=False, default=0)  # handed out so far

    @property
    def sequences(self) -> tuple[Request, ...]:
        """What of it holds a row and blocks: itself, and its shadow if it has one."""
        return (self,) if self.shadow is None else (self, self.shadow)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def samples(self) -> bool:
        """False for a request that only computes its prompt (`max_tokens=0`)."""
        return self.max_total > len(self.prompt_token_ids)

    @property
    def num_wanted(self) -> int:
        """Leading positions that should be computed, given what is known or in flight.

        The last token of all is sampled and never computed: once it is in flight, nothing is left to do.
        """
        known = len(self.tokens) + self.num_pending
        return self.num_computed if known >= self.max_total and self.samples else known

    def go_back(self, rewind: Rewind, block_size: int) -> list[int]:
        """Forget tokens of the answer and whatever is in flight; returns the blocks that are not needed any more.

        The last token that stays is computed again, to bring logits. If the cache knows its block, that is given
        back and filled anew, since a block that others may read is never written.
        """
        num_tokens = len(self.prompt_token_ids) + rewind.num_tokens
        del self.tokens[num_tokens:]
        del self.digests[num_tokens // block_size :]
        last = (num_tokens - 1) // block_size
        computed = last * block_size if last < self.num_registered else num_tokens - 1
        self.num_computed = self.num_committed = min(self.num_committed, computed)
        kept = -(-self.num_computed // block_size)
        dropped = self.blocks[kept:]
        del self.blocks[kept:]
        self.num_registered = min(self.num_registered, kept)
        self.num_pending = 0
        self.num_rewinds += 1
        self.rewind = rewind
        return dropped

    @property
    def needs_every_position(self) -> bool:
        """Whether blocks that others computed do not help: its embedding is made of what they were computed from."""
        return self.pooling is not None and self.pooling != "last"

    @property
    def awaits_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.num_prompt_logprobs < len(self.prompt_token_ids) - 1

    def take_prompt_logprobs(self, step: RowStep, entries: list[TokenLogprobs]) -> list[TokenLogprobs] | None:
        """Of a step's entries those that were not handed out before a preemption."""
        if self.params.prompt_logprobs is None:
            return None
        fresh = entries[self.num_prompt_logprobs - step.start :]
        self.num_prompt_logprobs += len(fresh)
        return fresh or None


def is_plain(request: Request) -> bool:
    """Whether a token of the request that does not end it has only to be appended and told."""
    params = request.params
    asked = (params.logprobs, params.prompt_logprobs, params.repetition_detection, params.grammar)
    alone = request.guard is None and request.shadow is None
    return alone and not params.sampler_trace and all(value is None for value in asked)


@dataclass(slots=True, eq=False)
class ForkGroup:
    """Requests with one prompt (`n` > 1): one of them, the leader, computes it for all.

    `held` members stay out of the waiting queue until the leader has computed the blocks that they will share.
    """

    leader: Request
    members: list[Request]
    held: list[Request]
    num_shared_blocks: int  # full blocks of the prompt, leaving at least one token to compute

    def source(self, block_size: int) -> Request | None:
        """A member whose first blocks hold the prompt's KV.

        Only what a result has confirmed counts: a step in flight may fail, and must not take the group with it.
        """
        for member in self.members:
            if member.num_committed >= self.num_shared_blocks * block_size:
                return member
        return None
