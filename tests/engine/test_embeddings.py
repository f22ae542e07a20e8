"""Embeddings through the whole engine: equal to transformers' hidden states pooled by hand, whatever the steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_answers import MakeCore, fresh_cores

from aphrodite.config import EngineConfig
from aphrodite.core.plan import Pooling
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.embedding import EmbeddingParams
from aphrodite.engine.messages import AddRequest
from aphrodite.errors import InvalidRequestError
from aphrodite.llm import LLM
from aphrodite.sampling.params import SamplingParams

POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")
PROMPTS = [[3 + (7 * i + 13 * j) % 200 for j in range(length)] for i, length in enumerate((1, 16, 17, 90))]
NOTHING = SamplingParams(max_tokens=0)
SEEDED = SamplingParams(max_tokens=20, temperature=1.1, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[tuple[Pooling, int], np.ndarray]:
    """By pooling and prompt, not normalised."""
    loaded = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[tuple[Pooling, int], np.ndarray] = {}
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states = loaded(torch.tensor([prompt])).last_hidden_state[0].double()
        found["mean", number] = states.mean(dim=0).numpy()
        found["last", number], found["cls", number] = states[-1].numpy(), states[0].numpy()
    return found


@pytest.fixture
def make_core(model: Path) -> Iterator[MakeCore]:
    with fresh_cores(model, kv_cache_memory=1 << 24) as make:
        yield make


def drain(core: EngineCore) -> tuple[dict[str, np.ndarray], dict[str, list[int]], dict[str, int]]:
    """Embeddings, tokens and cached prompt tokens of all requests."""
    embeddings: dict[str, np.ndarray] = {}
    tokens: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
            cached[update.request_id] = update.num_cached_tokens
            if update.embedding is not None:
                assert update.finish_reason == "length"
                embeddings[update.request_id] = np.frombuffer(update.embedding, np.float32)
        core.scheduler.check()
    return embeddings, tokens, cached


def add(core: EngineCore, name: str, prompt: list[int], pooling: Pooling | None, params: SamplingParams) -> None:
    core.add(AddRequest([name], [params.seed or 0], prompt, params, 0, None, pooling))


def embed_all(core: EngineCore) -> dict[str, np.ndarray]:
    for pooling in POOLINGS:
        for number, prompt in enumerate(PROMPTS):
            add(core, f"{pooling} {number}", prompt, pooling, NOTHING)
    return drain(core)[0]


SETTINGS: list[Any] = [
    pytest.param({"executor": "torch", "dtype": "float32"}, id="torch"),
    pytest.param({"executor": "torch", "dtype": "float32", "max_num_batched_tokens": 24}, id="chunks"),
    pytest.param({"executor": "torch", "dtype": "float32", "async_depth": 1, "max_num_seqs": 3}, id="ahead"),
    pytest.param({"activations": "float32", "kv_cache_dtype": "float32"}, id="native"),
    pytest.param(
        {"activations": "float32", "kv_cache_dtype": "float32", "max_num_batched_tokens": 24}, id="native chunks"
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_embeddings_equal_transformers(make_core: Any, expected: Any, settings: dict[str, Any]) -> None:
    found = embed_all(make_core(**settings))
    for (pooling, number), values in expected.items():
        np.testing.assert_allclose(found[f"{pooling} {number}"], values, atol=2e-4, err_msg=f"{pooling} {number}")


def test_chunks_and_neighbours_change_nothing(make_core: Any) -> None:
    reference = {"executor": "torch", "dtype": "float32"}
    whole, cut = (embed_all(make_core(**reference, max_num_batched_tokens=count)) for count in (512, 40))
    assert whole.keys() == cut.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(values, cut[name], rtol=2e-7, atol=1e-8)  # one rounding of a float64 sum


def test_answers_beside_them_stay_the_same_and_preemption_starts_them_anew(make_core: Any, expected: Any) -> None:
    settings = {"executor": "torch", "dtype": "float32", "max_num_batched_tokens": 24}
    alone = make_core(**settings)
    add(alone, "story", PROMPTS[2], None, SEEDED)
    story = drain(alone)[1]["story"]
    # Room for the long prompt and little more, so that it gives its blocks back to those that matter more.
    room = 8 * alone.runner.executor.kv_bytes_per_block
    core = make_core(**settings, kv_cache_memory=room, max_model_len=128, scheduling_policy="priority")
    core.add(AddRequest(["mean"], [0], PROMPTS[3], NOTHING, 1, None, "mean"))
    for _ in range(3):
        assert not core.step()
    for name in ("story", "other"):
        core.add(AddRequest([name], [SEEDED.seed or 0], PROMPTS[2], SEEDED, 0, None))
    embeddings, tokens, _ = drain(core)
    assert tokens["story"] == tokens["other"] == story
    assert core.stats().num_preemptions > 0
    np.testing.assert_allclose(embeddings["mean"], expected["mean", 3], atol=2e-4)


def test_cached_prefixes_serve_the_last_token_and_no_mean(make_core: Any, expected: Any) -> None:
    core = make_core(executor="torch", dtype="float32")
    add(core, "first", PROMPTS[3], None, SEEDED)
    drain(core)
    for pooling in POOLINGS:
        add(core, pooling, PROMPTS[3], pooling, NOTHING)
    embeddings, _, cached = drain(core)
    assert cached == {"mean": 0, "cls": 0, "last": 80}
    for pooling in POOLINGS:
        np.testing.assert_allclose(embeddings[pooling], expected[pooling, 3], atol=2e-4)


def test_non_finite_states_fail_their_own_request(model: Path, tmp_path: Path) -> None:
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    broken.save_pretrained(tmp_path)
    core = build_engine(
        EngineConfig(model=str(tmp_path), device="cpu", executor="torch", dtype="float32", kv_cache_memory=1 << 24), ()
    ).core
    add(core, "bad", [1, 7, 9], "mean", NOTHING)
    add(core, "good", [1, 8, 9], "mean", NOTHING)
    updates = {}
    while core.has_work():
        updates.update({update.request_id: update for update in core.step() if update.finish_reason})
    core.close()
    assert updates["bad"].finish_reason == "error"
    assert "non-finite hidden states" in (updates["bad"].error or "")
    assert updates["good"].embedding is not None


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    """Exact but for rounding."""
    exact = {"activations": "float32", "kv_cache_dtype": "float32"}
    with LLM(smollm2_path, device="cpu", kv_cache_memory=1 << 26, max_model_len=64, **exact) as loaded:
        yield loaded


TEXTS = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by a quarter point."]


def test_smollm2_equals_transformers(llm: LLM, smollm2_oracle: Any) -> None:
    for pooling in ("mean", "last"):
        found = llm.embed(TEXTS, EmbeddingParams(pooling=pooling), progress=False)
        for text, output in zip(TEXTS, found, strict=True):
            ids = llm.tokenizer.encode(text, add_special_tokens=True)
            assert output.prompt_token_ids == ids
            with torch.no_grad():
                states = smollm2_oracle.model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
            wanted = states.mean(axis=0) if pooling == "mean" else states[-1]
            assert output.values.dtype == np.float32
            assert abs(float(np.linalg.norm(output.values.astype(np.float64))) - 1) < 1e-6
            assert 1 - float(output.values @ wanted / np.linalg.norm(wanted)) < 1e-5


def test_likeness_in_meaning_is_likeness_of_vectors(llm: LLM) -> None:
    first, second, third = (output.values for output in llm.embed(TEXTS, EmbeddingParams("mean"), progress=False))
    assert first @ second > first @ third + 0.1


def test_dimensions_are_cut_before_the_length_is_made_one(llm: LLM) -> None:
    (raw,) = llm.embed(TEXTS[0], EmbeddingParams(normalize=False), progress=False)
    (cut,) = llm.embed(TEXTS[0], EmbeddingParams(dimensions=8), progress=False)
    (bare,) = llm.embed(TEXTS[0], EmbeddingParams(dimensions=8, normalize=False), progress=False)
    assert raw.values.shape == (576,)
    np.testing.assert_array_equal(bare.values, raw.values[:8])
    np.testing.assert_allclose(cut.values, raw.values[:8] / np.linalg.norm(raw.values[:8]), rtol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("text", EmbeddingParams(dimensions=577), "1 to 576"),
        ("text", EmbeddingParams(dimensions=0), "1 to 576"),
        ([1] * 65, EmbeddingParams(), "65 in the prompt"),
        ([], EmbeddingParams(), "empty"),
        ([49152], EmbeddingParams(), "outside the vocabulary"),
    ],
)
def test_what_cannot_be_embedded_is_refused(llm: LLM, prompt: Any, params: EmbeddingParams, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.embed([prompt], params, progress=False)


def test_a_context_full_of_text_is_embedded(llm: LLM) -> None:
    (output,) = llm.embed([[5] * 64], progress=False)
    assert len(output.prompt_token_ids) == 64


def test_an_embedding_model_is_served_as_its_files_say(tmp_path: Path, smollm2_path: Path) -> None:
    """As Qwen3-Embedding is published: without a head, names without a prefix, and sentence-transformers' files."""
    torch.manual_seed(5)
    config = transformers.Qwen3Config(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = transformers.Qwen3Model(config)
    model.eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "architectures": ["Qwen3ForCausalLM"]}))
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    steps = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    with LLM(
        tmp_path, tokenizer=str(smollm2_path), device="cpu", dtype="float32", kv_cache_memory=1 << 22, max_model_len=128
    ) as llm:
        assert (llm.info.embedding.pooling, llm.info.embedding.normalize, llm.info.embedding.size) == ("mean", True, 64)
        (found,) = llm.embed([PROMPTS[3]], progress=False)
    with torch.no_grad():
        mean = model(torch.tensor([PROMPTS[3]])).last_hidden_state[0].double().mean(dim=0).numpy()
    np.testing.assert_allclose(found.values, mean / np.linalg.norm(mean), atol=1e-5)
