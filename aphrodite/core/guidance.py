"""Classifier-free guidance (Sanchez et al., 2023, arXiv:2306.17806): requests whose tokens are chosen with a second
sequence's logits beside their own.

That sequence, the request's *shadow*, is the negative prompt with the same answer behind it. Towards blocks, rows,
the prefix cache and steps in flight it is a `Request` like any other. Apart from that it has no life of its own: it
stands in no queue, samples nothing, and starts, gives its blocks back, goes back and ends with its request. Either
may take many steps over its prompt; the last known token of both is computed in one step, which samples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from aphrodite.core.request import Request
from aphrodite.core.scheduler_config import SchedulerConfig, token_array
from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams

_PLAIN = SamplingParams()  # a shadow's row is never sampled


def answer_room(num_prompt: int, num_negative: int, *, max_model_len: int, num_blocks: int, block_size: int) -> int:
    """The most tokens of an answer for which both sequences fit the context and, together, the KV cache."""

    def overflows(count: int) -> bool:
        needed = -(-(num_prompt + count) // block_size) - (-(num_negative + count) // block_size)
        return needed > num_blocks

    room = max(0, max_model_len - max(num_prompt, num_negative))
    return max(0, bisect_left(range(room + 1), True, key=overflows) - 1)


def make_shadow(request: Request, max_total: int, config: SchedulerConfig) -> tuple[int, Request]:
    """The number of tokens at which a request with a negative prompt ends with "length", and its shadow.

    Args:
        max_total: that number for the request alone.

    Raises:
        InvalidRequestError: the two could never run, even alone.
    """
    if config.max_num_seqs < 2 or config.max_num_batched_tokens < 2:
        raise InvalidRequestError(
            "guidance computes two sequences at once, and this engine runs one: raise max_num_seqs and"
            " max_num_batched_tokens to 2 or more, or leave guidance_scale out",
            param="guidance_scale",
        )
    negative = request.negative_prompt_ids
    if not negative:
        raise InvalidRequestError("the negative prompt has no tokens; it needs at least one", param="negative_prompt")
    room = answer_room(
        request.num_prompt_tokens,
        len(negative),
        max_model_len=config.max_model_len,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
    )
    if room == 0:
        raise InvalidRequestError(
            f"the prompt has {request.num_prompt_tokens} tokens and the negative prompt {len(negative)}: with an"
            f" answer behind each they do not fit the context of {config.max_model_len} tokens, or the KV cache of"
            f" {config.num_blocks} blocks of {config.block_size}; shorten them",
            param="negative_prompt",
            code="context_length_exceeded",
        )
    salt, adapter = request.cache_salt, request.adapter
    shadow = Request(request.request_id, negative, _PLAIN, request.seed, cache_salt=salt, adapter=adapter)
    shadow.tokens = token_array(negative, "negative_prompt")
    shadow.owner = request
    return min(max_total, request.num_prompt_tokens + room), shadow


def pair_counts(request: Request, budget: int, num_others: int, config: SchedulerConfig) -> tuple[int, int]:
    """How many positions of a guided request and of its shadow to compute in a step: to both ends, or to neither.

    The shadow goes first, so that members of a fork group find its blocks where they find those of the prompt.

    Args:
        budget: tokens that are left to the step, at least 2.
        num_others: of these, tokens that others need, as far as two are left.
    """
    shadow = request.shadow
    assert shadow is not None
    budget = min(budget, max(2, budget - num_others))
    most = config.prompt_logprobs_chunk if request.awaits_prompt_logprobs else budget
    rest = len(request.tokens) + request.num_pending - request.num_computed
    shadow_rest = len(shadow.tokens) + shadow.num_pending - shadow.num_computed
    if rest + shadow_rest <= budget and rest <= most:
        return rest, shadow_rest
    shadow_count = min(shadow_rest - 1, budget)
    return min(rest - 1, budget - shadow_count, most), shadow_count


def missing_blocks(request: Request, counts: tuple[int, int], block_size: int) -> list[int]:
    """How many blocks a guided request and its shadow lack for so many more positions."""
    return [
        -(-(sequence.num_computed + count) // block_size) - len(sequence.blocks) if count else 0
        for sequence, count in zip(request.sequences, counts, strict=True)
    ]


def check_shadow(request: Request, inflight: Sequence[Request]) -> None:
    """Verify that an unfinished guided request and its shadow agree.

    Raises:
        RuntimeError: an invariant is broken.
    """
    shadow = request.shadow
    if shadow is None:
        return
    name = f"request {request.request_id}"
    answers = (request.tokens[request.num_prompt_tokens :], shadow.tokens[shadow.num_prompt_tokens :])
    if answers[0] != answers[1] or request.num_pending != shadow.num_pending:
        raise RuntimeError(f"{name}: its shadow has another answer")
    if (request.row is None) != (shadow.row is None) or (request.num_rewinds, request.num_preemptions) != (
        shadow.num_rewinds,
        shadow.num_preemptions,
    ):
        raise RuntimeError(f"{name}: its shadow stands elsewhere")
    if sum(r is shadow for r in inflight) != shadow.num_inflight:
        raise RuntimeError(f"{name}: its shadow's steps in flight are miscounted")
    if not shadow.num_committed <= shadow.num_computed <= len(shadow.tokens) + shadow.num_pending:
        raise RuntimeError(f"{name}: its shadow's progress is inconsistent")
