"""A runner in plain Python that knows what every KV slot must hold, and what every request must answer.

A token is a pure function of everything before it, the salt and the seed, so a request's answer is known
without any scheduler. A slot of the fake KV cache remembers which prefix was last written there; a step reads
all slots before the positions it computes, as they were before the step, and each must hold exactly the
request's own prefix.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from aphrodite.core.plan import RowResult, RowStart, StepPlan, StepResult, TokenLogprobs
from aphrodite.core.request import OutputToken, Request, RequestUpdate, Rewind
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.sampling.params import SamplingParams

VOCAB = 12
EOS = 0


def sampled(history: tuple[object, ...], seed: int, barred: Iterable[int] = ()) -> int | None:
    """The token after `history`: the first of an order in which they come; None if all are barred.

    With guidance the history is a pair: the request's own and its shadow's.
    """
    order = random.Random(f"{seed}:{history}").sample(range(VOCAB), VOCAB)
    return next((token for token in order if token not in barred), None)


class SequenceGuard:
    """Keeps sequences of tokens out of an answer, going back to their first token up to `limit` times there."""

    def __init__(self, banned: tuple[tuple[int, ...], ...], limit: int) -> None:
        self.banned, self.limit = banned, limit
        self.warning: str | None = None
        self.tokens: list[OutputToken] = []
        self.num_released = 0
        self.barred: dict[int, list[int]] = {}
        self.waived: set[int] = set()

    def push(
        self, token: OutputToken, finish_reason: str | None, *, complete: bool = False
    ) -> list[OutputToken] | Rewind:
        self.tokens.append(token)
        ids = tuple(token.token_id for token in self.tokens)
        for sequence in self.banned:
            # What was let go as harmless may begin a match after all, once another token follows it.
            begin = max(len(ids) - len(sequence), self.num_released)
            if ids[-len(sequence) :] == sequence:
                if begin not in self.waived:
                    return self.go_back(begin)
                self.warning = "let through"
        held = max(n for s in self.banned for n in range(len(s)) if n <= len(ids) and s[:n] == ids[len(ids) - n :])
        end = len(ids) - (0 if finish_reason else held)
        released = self.tokens[self.num_released : end]
        self.num_released = max(end, self.num_released)
        return released

    def go_back(self, position: int) -> Rewind:
        self.barred = {p: ids for p, ids in self.barred.items() if p <= position}
        self.waived = {p for p in self.waived if p <= position}
        barred = self.barred.setdefault(position, [])
        barred.append(self.tokens[position].token_id)
        if len(barred) > self.limit:
            return self.waive(position)
        del self.tokens[position:]
        return Rewind(position, list(barred))

    def waive(self, position: int) -> Rewind:
        self.barred[position] = []
        self.waived.add(position)
        del self.tokens[position:]
        return Rewind(position, [])

    def relent(self) -> Rewind | None:
        return self.waive(len(self.tokens)) if self.barred.get(len(self.tokens)) else None


def longest(prompt: int, negative: tuple[int, ...] | None, max_tokens: int | None, config: SchedulerConfig) -> int:
    """Tokens at which a sequence ends with "length"."""
    total = min(config.max_model_len, config.num_blocks * config.block_size)
    if max_tokens is not None:
        total = min(total, prompt + max_tokens)
    if negative is None or max_tokens == 0:
        return total

    def fits(total: int) -> bool:
        pair = (total, total - prompt + len(negative))
        blocks = sum(-(-tokens // config.block_size) for tokens in pair)
        return max(pair) <= config.max_model_len and blocks <= config.num_blocks

    return max((total for total in range(prompt, total + 1) if fits(total)), default=prompt)


def expected_answer(request: Request, config: SchedulerConfig) -> tuple[list[int], str, int | None]:
    """Output tokens, finish reason and stop reason, from the rules alone."""
    params, history = request.params, tuple(request.prompt_token_ids)
    negative = None if request.negative_prompt_ids is None else tuple(request.negative_prompt_ids)
    limit = longest(len(history), negative, params.max_tokens, config)
    prompt = len(history)
    guard = None if request.guard is None else SequenceGuard(request.guard.banned, request.guard.limit)
    barred: dict[int, list[int]] = {}
    while len(history) < limit:
        context = history if negative is None else (history, negative + history[prompt:])
        token = sampled(context, request.seed, barred.get(len(history) - prompt, ()))
        finish, stop = None, None
        if token is not None:
            may_stop = len(history) - prompt >= params.min_tokens
            history += (token,)
            if may_stop and token in config.eos_token_ids and not params.ignore_eos:
                finish = "stop"
            elif may_stop and token in params.stop_token_ids:
                finish, stop = "stop", token
            elif len(history) == limit:
                finish = "length"
        if guard is not None:
            verdict = guard.relent() if token is None else guard.push(OutputToken(token, None, None), finish)
            if isinstance(verdict, Rewind):
                history = history[: prompt + verdict.num_tokens]
                barred = {p: ids for p, ids in barred.items() if p < verdict.num_tokens}
                barred[verdict.num_tokens] = verdict.barred
                continue
        if finish is not None:
            return list(history[prompt:]), finish, stop
    return list(history[prompt:]), "length", None


class FakeRow:
    def __init__(self, start: RowStart, salt: bytes | None) -> None:
        self.start = start
        self.salt = salt
        self.tokens = list(start.prompt_token_ids)
        self.table: list[int] = []
        self.fresh = True
        self.barred: dict[int, list[int]] = {}
        self.rewound = False
        self.num_own = 0  # leading blocks of the table that the row had before
        self.shadow: int | None = None  # the row that guides this one
        self.is_shadow = False


class FakeRunner:
    """Executes plans in order and checks them against the contract of `core/plan.py`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.rows: dict[int, FakeRow] = {}
        self.slots: dict[tuple[int, int], tuple[int, object]] = {}  # the era of its writing, and what was written
        self.era = 0  # resets of the prefix cache so far
        self.siblings: set[str] = set()  # these may borrow from each other, however old the blocks
        self.salts: dict[str, bytes | None] = {}
        self.negatives: dict[str, list[int]] = {}
        self.started: dict[str, int] = {}
        self.failing: set[str] = set()
        self.num_computed_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.steps, "an empty step"
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        for row in plan.ends:
            del self.rows[row]
        for start in plan.starts:
            assert start.row not in self.rows, "row is taken"
            assert 0 <= start.row < self.config.max_num_seqs
            self._start(start)
        assert len({step.row for step in plan.steps}) == len(plan.steps)
        for row, position, barred in plan.rewinds:
            (step,) = (step for step in plan.steps if step.row == row)
            assert step.reset_blocks
            self.rows[row].rewound = True
            assert len(self.rows[row].start.prompt_token_ids) <= position <= len(self.rows[row].tokens)
            dropped = len(self.rows[row].tokens) - position
            del self.rows[row].tokens[position:]
            if self.rows[row].shadow is not None and dropped:
                del self.rows[self.rows[row].shadow].tokens[-dropped:]
            self.rows[row].barred = {p: ids for p, ids in self.rows[row].barred.items() if p < position}
            self.rows[row].barred[position] = barred
        for step in plan.steps:
            self._bind(step)
        written: set[tuple[int, int]] = set()
        writes: dict[tuple[int, int], tuple[int, object]] = {}
        for step in plan.steps:
            self._compute(step, writes, written)
        self.slots.update(writes)
        self.num_computed_tokens += plan.num_tokens
        followers = [*plan.steps[1:], None]
        return StepResult(plan.step_id, [self._result(*pair) for pair in zip(plan.steps, followers, strict=True)])

    def _start(self, start: RowStart) -> None:
        """A request's row, or the row of its shadow, which starts behind it."""
        name = start.request_id
        row = self.rows[start.row] = FakeRow(start, self.salts[name])
        if name not in self.started:
            self.started[name] = start.row
            return
        owner = self.rows[self.started[name]]
        assert owner.start.request_id == name
        assert owner.shadow is None, "started twice"
        assert start.prompt_token_ids == self.negatives[name]
        assert start.sampling == SamplingParams()
        owner.shadow, row.is_shadow = start.row, True

    def _bind(self, step) -> None:
        row = self.rows[step.row]
        row.num_own = 0
        if step.reset_blocks:
            if row.rewound or row.is_shadow:  # what went back without losing its blocks names those that it keeps
                pairs = zip(row.table, step.blocks, strict=False)
                row.num_own = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            row.table = []
        row.rewound = False
        assert step.reset_blocks or not row.fresh, "a new row's first step carries its whole table"
        row.fresh = False
        row.table = row.table + step.blocks
        assert len(set(row.table)) == len(row.table)
        assert all(0 <= block < self.config.num_blocks for block in row.table)
        assert step.count >= 1
        assert len(row.table) == -(-(step.start + step.count) // self.config.block_size), "blocks != need"

    def _compute(self, step, writes, written) -> None:
        row, size = self.rows[step.row], self.config.block_size
        end = step.start + step.count
        assert end <= len(row.tokens), "computes a token that nobody has sampled"
        prompt, most = len(row.start.prompt_token_ids), row.start.sampling.max_tokens
        last = longest(prompt, self.negatives.get(row.start.request_id), most, self.config)
        # A shadow may be computed up to where its request went back before the request's own step tells of that.
        complete = not row.is_shadow and len(row.tokens) >= last
        assert most == 0 or not complete, "computes for a request that has all its tokens"
        name = row.start.request_id
        failing = name in self.failing
        for position in range(step.start):
            era, content = self.slots.get((row.table[position // size], position % size), (-1, None))
            assert failing or content == self._content(row, position), f"stale KV at {position}"
            if step.reset_blocks and name not in self.siblings and position >= row.num_own * size:
                assert failing or era == self.era, "found a prefix that a reset had forgotten"
        for position in range(step.start, end):
            slot = (row.table[position // size], position % size)
            assert slot not in written, "two rows write one slot"
            written.add(slot)
            # A failed step leaves nothing that anyone may use.
            writes[slot] = (self.era, "poison" if failing else self._content(row, position))

    @staticmethod
    def _content(row: FakeRow, position: int) -> object:
        return row.salt, tuple(row.tokens[: position + 1])

    def _result(self, step, follower) -> RowResult:
        row = self.rows[step.row]
        end = step.start + step.count
        prompt = row.start.prompt_token_ids
        prompt_logprobs = None
        if row.start.sampling.prompt_logprobs is not None:
            prompt_logprobs = [
                TokenLogprobs(prompt[p], -float(p), 1, [], [])
                for p in range(step.start + 1, min(end, len(prompt) - 1) + 1)
            ]
        token = None
        assert (step.guide == -1) == (row.shadow is None or not step.samples)
        assert not (row.is_shadow and step.samples)
        if step.samples:
            assert end == len(row.tokens), "samples from a position that is not the last"
            history: tuple[object, ...] = tuple(row.tokens)
            if row.shadow is not None:
                shadow = self.rows[row.shadow]
                assert (step.guide, follower.row) == (row.shadow, row.shadow)
                assert follower.start + follower.count == len(shadow.tokens), "guided from a position that is not last"
                history = (history, tuple(shadow.tokens))
            token = sampled(history, row.start.seed, row.barred.get(len(row.tokens), ()))
            row.tokens.append(0 if token is None else token)
            if row.shadow is not None:
                shadow.tokens.append(row.tokens[-1])
            if token is None:
                return RowResult(step.row, error="nothing is left to choose")
        if row.start.request_id in self.failing:
            return RowResult(step.row, error="injected")
        return RowResult(step.row, token_id=token, prompt_logprobs=prompt_logprobs)


class Harness:
    """A scheduler with its fake runner, and everything that was said about each request."""

    def __init__(self, depth: int = 0, **config) -> None:
        sizes = {
            "num_blocks": 16,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_model_len": 64,
            "block_size": 4,
        }
        self.config = SchedulerConfig(**(sizes | {"eos_token_ids": frozenset({EOS})} | config))
        self.scheduler = Scheduler(self.config)
        self.runner = FakeRunner(self.config)
        self.depth = depth
        self.inflight: deque[tuple[StepPlan, StepResult]] = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.ended: dict[str, RequestUpdate] = {}
        self.plans: list[StepPlan] = []

    def add(
        self,
        *prompts: list[int],
        salt: bytes | None = None,
        priority: int = 0,
        n: int = 1,
        banned: tuple[tuple[int, ...], ...] = (),
        limit: int = 3,
        negative: list[int] | None = None,
        **params,
    ) -> list[str]:
        """Add each prompt as a group of `n`; returns the request ids."""
        ids = []
        for prompt in prompts:
            group = []
            for _ in range(n):
                name = f"r{len(self.requests)}"
                request = Request(name, list(prompt), SamplingParams(**params), len(self.requests), priority, salt)
                request.guard = SequenceGuard(banned, limit) if banned else None
                if negative is not None:
                    request.negative_prompt_ids = self.runner.negatives[name] = list(negative)
                self.requests[name] = request
                self.runner.salts[name] = salt
                group.append(request)
                if n > 1:
                    self.runner.siblings.add(name)
            try:
                self.scheduler.add(group)
            except Exception:
                for request in group:
                    del self.requests[request.request_id]
                    self.runner.negatives.pop(request.request_id, None)
                raise
            ids += [request.request_id for request in group]
        return ids

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.inflight.append((plan, self.runner.run(plan)))
        self.scheduler.check()
        return plan

    def collect(self) -> list[RequestUpdate]:
        updates = self.scheduler.commit(*self.inflight.popleft())
        self.take(updates)
        self.scheduler.check()
        return updates

    def step(self) -> list[RequestUpdate]:
        """Launch up to the depth, then commit the oldest plan."""
        while len(self.inflight) <= self.depth and self.launch() is not None:
            pass
        assert self.inflight or not self.scheduler.has_unfinished(), "nothing can run and nothing is in flight"
        return self.collect() if self.inflight else []

    def abort(self, *ids: str) -> None:
        self.take(self.scheduler.abort(ids))
        self.scheduler.check()

    def reset(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.runner.era += 1
        self.scheduler.check()

    def take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            name = update.request_id
            assert name not in self.ended, "heard of after its end"
            self.outputs.setdefault(name, []).extend(update.token_ids)
            self.prompt_logprobs.setdefault(name, []).extend(update.prompt_logprobs or [])
            if update.finish_reason is not None:
                self.ended[name] = update
                self.verify(name)

    def verify(self, name: str) -> None:
        request, update, output = self.requests[name], self.ended[name], self.outputs[name]
        tokens, finish, stop = expected_answer(request, self.config)
        if update.finish_reason in ("abort", "error"):
            assert output == tokens[: len(output)]
            return
        assert (output, update.finish_reason, update.stop_reason) == (tokens, finish, stop)
        if request.params.prompt_logprobs is not None:
            prompt = request.prompt_token_ids
            got = [(entry.token_id, -entry.logprob) for entry in self.prompt_logprobs[name]]
            assert got == [(prompt[p], float(p)) for p in range(1, len(prompt))]

    def run(self, limit: int = 10_000) -> None:
        """Step until everything has ended."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished() and not self.inflight:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps")
