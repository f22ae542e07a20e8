"""Random traffic against the oracle: adding, stepping, running ahead, aborting, failing, resetting, in any order.

The fake runner checks that every step reads exactly its own prefix from the blocks it names, the harness that
every answer equals the one computed without a scheduler, and `Scheduler.check` conservation after each action.
Pools are tiny, so preemption, eviction and hits happen all the time.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_oracle import VOCAB, Harness, longest

from aphrodite.errors import InvalidRequestError

# Prompts are cut from few texts, so that prefixes coincide.
TEXTS = [[random.Random(seed).randrange(VOCAB) for _ in range(48)] for seed in range(3)]

PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.sampled_from([0, 1, 2, 5, 30]),
        "min_tokens": st.integers(0, 6),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(3,), (0, 5)]),
        "prompt_logprobs": st.just(1),
    },
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 14),
        rows=st.integers(1, 5),
        budget=st.sampled_from([1, 2, 5, 16]),
        block_size=st.sampled_from([1, 2, 4]),
        caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunk=st.sampled_from([1, 3, 128]),
        beside=st.sampled_from([None, 1, 4]),
        depth=st.integers(0, 2),
    )
    def build(self, num_blocks, rows, budget, block_size, caching, policy, chunk, beside, depth):
        self.harness = Harness(
            depth=depth,
            num_blocks=num_blocks,
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            max_model_len=24,
            block_size=block_size,
            enable_prefix_caching=caching,
            policy=policy,
            prompt_logprobs_chunk=chunk,
            prompt_tokens_beside_answers=beside,
        )

    @rule(
        text=st.sampled_from(TEXTS),
        share=st.floats(0, 1),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, b"", b"tenant"]),
        params=PARAMS,
        banned=st.one_of(
            st.just(()),
            st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), max_size=VOCAB).map(tuple),
            # One or two tokens are in every text, so these make the answer go back all the time.
            st.sets(st.integers(0, VOCAB - 1), min_size=6).map(lambda ids: tuple((i,) for i in sorted(ids))),
        ),
        limit=st.sampled_from([1, 3, VOCAB + 1]),
        negative=st.one_of(st.none(), st.tuples(st.sampled_from(TEXTS), st.floats(0, 1))),
    )
    def add(self, text, share, n, priority, salt, params, banned, limit, negative):
        config = self.harness.config
        length = 1 + int(share * (config.capacity - 2))
        if negative is not None:
            negative = negative[0][: 1 + int(negative[1] * (config.capacity - 2))]
            fits = longest(length, tuple(negative), None, config) > length
            if params.get("max_tokens") != 0 and (
                not fits or config.max_num_seqs == 1 or config.max_num_batched_tokens == 1
            ):
                with pytest.raises(InvalidRequestError):
                    self.harness.add(text[:length], n=n, negative=negative, **params)
                return
        self.harness.add(
            text[:length], n=n, priority=priority, salt=salt, banned=banned, limit=limit, negative=negative, **params
        )

    @rule()
    def step(self):
        self.harness.step()

    @precondition(lambda self: len(self.harness.inflight) <= self.harness.depth)
    @rule()
    def launch(self):
        self.harness.launch()

    @precondition(lambda self: self.harness.inflight)
    @rule()
    def collect(self):
        self.harness.collect()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def abort(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.harness.requests)), max_size=4))
        self.harness.abort(*names)

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def fail(self, data):
        self.harness.runner.failing.add(data.draw(st.sampled_from(sorted(self.harness.requests))))

    @rule()
    def reset(self):
        self.harness.reset()

    @invariant()
    def counts_agree(self):
        scheduler = self.harness.scheduler
        unfinished = len(self.harness.requests) - len(self.harness.ended)
        assert scheduler.num_waiting + scheduler.num_running == unfinished
        assert scheduler.has_unfinished() == bool(unfinished)

    def teardown(self):
        if not hasattr(self, "harness"):
            return
        self.harness.run()
        assert self.harness.ended.keys() == self.harness.requests.keys()
        stats = self.harness.scheduler.stats()
        assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (0, 0, 0.0)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerMachine = SchedulerMachine.TestCase
