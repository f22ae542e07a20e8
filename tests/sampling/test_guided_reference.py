"""Guided answers of the whole engine against transformers, greedy and drawn, on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.params import SamplingParams

VOCAB, STEPS = 211, 24
PROMPT = [3 + 7 * i % 200 for i in range(37)]
NEGATIVES = [[], [9], PROMPT[5:], [3 + 11 * i % 200 for i in range(60)]]
SCALES = [-0.5, 0.0, 0.5, 1.5, 3.0]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module", params=["torch", "native"])
def core(model: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineCore]:
    folder = tmp_path_factory.mktemp("guided")
    model.save_pretrained(folder)
    exact = {"dtype": "float32"} if request.param == "torch" else {"activations": "float32"}
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        executor=request.param,
        kv_cache_dtype="float32",
        threads=1,
        max_num_seqs=4,
        kv_cache_memory=4 << 20,
        **exact,  # type: ignore[arg-type]
    )
    core = build_engine(config, ()).core
    yield core
    core.close()


def answer(core: EngineCore, params: SamplingParams, seed: int = 1) -> list[int]:
    core.add(AddRequest(["r"], [seed], PROMPT, params, 0, None))
    tokens: list[int] = []
    while core.has_work():
        for update in core.step():
            assert update.error is None
            tokens += update.token_ids
    core.scheduler.check()
    return tokens


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("negative", NEGATIVES)
def test_greedy_tokens_are_those_of_transformers(
    core: EngineCore, model: Any, scale: float, negative: list[int]
) -> None:
    theirs = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        guidance_scale=scale,
        negative_prompt_ids=torch.tensor([negative]) if negative else None,
    )
    params = SamplingParams(
        max_tokens=STEPS, temperature=0.0, ignore_eos=True, guidance_scale=scale, negative_prompt_ids=tuple(negative)
    )
    assert answer(core, params) == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.4, "min_p": 0.05, "xtc_probability": 0.5},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "temperature_last": True},
        {"mirostat_mode": 2, "mirostat_tau": 3.0, "logit_bias": {5: 2.0}},
        {"smoothing_factor": 0.3, "typical_p": 0.9, "skew": 0.3},
    ],
)
def test_drawn_tokens_are_those_of_the_reference_sampler(core: EngineCore, model: Any, fields: dict[str, Any]) -> None:
    negative, scale = NEGATIVES[3], 1.7
    params = SamplingParams(
        max_tokens=STEPS, ignore_eos=True, guidance_scale=scale, negative_prompt_ids=tuple(negative), **fields
    )
    row = reference.Row(list(PROMPT), [], 77, params, text=lambda token: b"t%d " % token)
    margin = float("inf")
    for _ in range(STEPS):
        with torch.no_grad():
            wanted, unwanted = (
                model(torch.tensor([prompt + row.output])).logits[0, -1].double().log_softmax(-1)
                for prompt in (PROMPT, negative)
            )
        outcome = reference.sample((unwanted + scale * (wanted - unwanted)).numpy(), row)
        margin = min(margin, outcome.margin)
        assert outcome.token is not None
        row.output.append(outcome.token)
    assert margin > 2e-5, "the test would depend on rounding"
    assert answer(core, params, seed=77) == row.output


def test_log_probabilities_and_traces_are_of_the_guided_distribution(core: EngineCore, model: Any) -> None:
    params = SamplingParams(
        max_tokens=4, guidance_scale=2.0, negative_prompt_ids=(9, 8), logprobs=3, sampler_trace=True, min_p=0.1,
        prompt_logprobs=0,
    )  # fmt: skip
    core.add(AddRequest(["r"], [3], PROMPT, params, 0, None))
    updates = []
    while core.has_work():
        updates += core.step()
    output: list[int] = []
    for update in updates:
        for token, entry, trace in zip(update.token_ids, update.logprobs or [], update.traces or [], strict=True):
            with torch.no_grad():
                c, u = (
                    model(torch.tensor([prompt + output])).logits[0, -1].double().log_softmax(-1)
                    for prompt in (PROMPT, [9, 8])
                )
            guided = (u + 2 * (c - u)).log_softmax(-1)
            assert entry.logprob == pytest.approx(float(guided[token]), abs=1e-4)
            assert entry.top_ids == guided.topk(3).indices.tolist()
            assert trace.stages[0].probability == pytest.approx(float(guided[token].exp()), abs=1e-5)
            output.append(token)
    scores = [entry for update in updates for entry in update.prompt_logprobs or []]
    with torch.no_grad():
        plain = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert [entry.logprob for entry in scores] == pytest.approx(
        [float(plain[position, token]) for position, token in enumerate(PROMPT[1:])], abs=1e-4
    )


def test_a_scale_of_one_is_no_guidance_at_all(core: EngineCore) -> None:
    plain = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    one = SamplingParams(max_tokens=STEPS, ignore_eos=True, guidance_scale=1.0, negative_prompt_ids=(5, 6))
    more = SamplingParams(max_tokens=STEPS, ignore_eos=True, guidance_scale=1.5, negative_prompt_ids=(5, 6))
    assert answer(core, plain, seed=4) == answer(core, one, seed=4) != answer(core, more, seed=4)
