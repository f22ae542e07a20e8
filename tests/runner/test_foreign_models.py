"""Models that are not built in, through transformers' modelling code: against transformers alone; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from foreign_cases import CASES, GPT_NEOX, SIZES, ForeignCase
from safetensors.torch import load_file, save_file
from torch_executor_cases import Driver, prompts

from aphrodite.errors import ConfigError, ModelFormatError, UnknownArchitectureError
from aphrodite.llm import LLM
from aphrodite.loading.foreign import ForeignCheckpoint, open_described, open_model
from aphrodite.loading.inspect import inspect
from aphrodite.models import foreign
from aphrodite.runner.transformers_executor import TransformersExecutor
from aphrodite.sampling.params import SamplingParams

STEPS = 32
LENGTHS = (5, 61, 150)


class Loaded(NamedTuple):
    model: Any  # of transformers
    executor: TransformersExecutor


def executor_at(path: Path, dtype: torch.dtype = torch.float32) -> TransformersExecutor:
    loader = open_described(path)
    assert isinstance(loader, foreign.ForeignLoader)
    executor = TransformersExecutor(
        loader, block_size=16, max_model_len=512, dtype=dtype, kv_dtype=dtype, device=torch.device("cpu")
    )
    executor.allocate_kv_cache(200)
    return executor


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("foreign")
    model = request.param.model()
    model.save_pretrained(folder)
    return Loaded(model, executor_at(folder))


@pytest.fixture(scope="module")
def gpt_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GPT_NEOX.save(tmp_path_factory.mktemp("gpt_neox"))


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def test_logits_and_greedy_tokens_equal_transformers(loaded: Loaded) -> None:
    driver = Driver(loaded.executor)  # type: ignore[arg-type]
    batch = [driver.add(tokens) for tokens in prompts(211, LENGTHS)]
    for request, logits in zip(batch, driver.step([(r, len(r.tokens)) for r in batch]), strict=True):
        expected = reference(loaded.model, request.tokens)
        assert expected.std() > 0.5  # a difference could be seen
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    (prompt,) = prompts(211, (45,), seed=2)
    request = driver.add(prompt, capacity=len(prompt) + STEPS)
    (logits,) = driver.step([(request, len(prompt))])
    for _ in range(STEPS):
        request.tokens.append(int(logits[-1].argmax()))
        (logits,) = driver.step([(request, 1)])
    expected = reference(loaded.model, request.tokens)
    assert request.tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_chunks_and_decode_equal_prefill(loaded: Loaded) -> None:
    driver = Driver(loaded.executor)  # type: ignore[arg-type]
    (tokens,) = prompts(211, (130,))
    whole, chunked, neighbour = (driver.add(tokens) for _ in range(3))
    (expected,) = driver.step([(whole, 130)])
    chunks = [driver.step([(chunked, count)])[0] for count in (7, 1, 64)]
    chunks.append(driver.step([(neighbour, 37), (chunked, 50)])[1])
    chunks += [driver.step([(chunked, 1), (neighbour, 1)])[0] for _ in range(8)]
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=0, atol=1e-4)


def test_only_wanted_rows_have_logits(loaded: Loaded) -> None:
    driver = Driver(loaded.executor)  # type: ignore[arg-type]
    (tokens,) = prompts(211, (20,))
    (every,) = driver.step([(driver.add(tokens), 20)])
    inputs = driver.inputs([(driver.add(tokens), 20)])
    some = loaded.executor.forward(inputs._replace(logits_index=torch.tensor([3, 19], dtype=torch.int32)))
    torch.testing.assert_close(some, every[[3, 19]], rtol=0, atol=1e-5)
    assert loaded.executor.forward(inputs._replace(logits_index=torch.zeros(0, dtype=torch.int32))).shape == (0, 211)


def test_half_precision_is_served_from_the_files_own_bytes(tmp_path: Path) -> None:
    GPT_NEOX.model().to(torch.bfloat16).save_pretrained(tmp_path)
    executor = executor_at(tmp_path, torch.bfloat16)
    driver = Driver(executor)  # type: ignore[arg-type]
    (tokens,) = prompts(211, (40,))
    (logits,) = driver.step([(driver.add(tokens), 40)])
    expected = reference(GPT_NEOX.model(), tokens)
    assert float((logits - expected).norm() / expected.norm()) < 0.05
    assert executor.weight_bytes < 1.1 * sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def llm(gpt_neox: Path, smollm2_path: Path) -> LLM:
    return LLM(str(gpt_neox), device="cpu", dtype="float32", tokenizer=str(smollm2_path), kv_cache_memory=1 << 24)


def test_the_engine_serves_one_with_its_prefix_cache(llm: LLM, gpt_neox: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt_neox).eval()
    shared, *tails = prompts(211, (48, 5, 9, 1))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = llm.generate([shared], params, progress=False)[0]
    assert first.num_cached_tokens == 0
    for output, tail in zip(
        llm.generate([shared + tail for tail in tails], params, progress=False), tails, strict=True
    ):
        answer = output.outputs[0].token_ids
        expected = reference(model, [*shared, *tail, *answer])
        assert list(answer) == expected[len(shared) + len(tail) - 1 : -1].argmax(dim=-1).tolist()
        assert output.num_cached_tokens == 48
    assert "transformers" in llm.info.kernels["executor"]
    assert llm.info.family == "gpt_neox"


def test_our_samplers_work_on_it(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.3, seed=4, max_tokens=24, ignore_eos=True, dry_multiplier=0.8, xtc_probability=0.5
    )
    (prompt,) = prompts(211, (20,))
    answers = [llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 12


def test_settings_that_it_cannot_have_are_refused(gpt_neox: Path, smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match="left to transformers"):
        LLM(str(gpt_neox), device="cpu", executor="native", tokenizer=str(smollm2_path))


def test_inspection_says_who_computes_it(gpt_neox: Path) -> None:
    facts = inspect(gpt_neox)
    assert facts.family == "gpt_neox, through transformers"
    assert (facts.num_layers, facts.num_heads, facts.head_dim, facts.vocab_size) == (3, 4, 16, 211)
    assert facts.kv_bytes_per_token == 2 * 2 * 3 * 64


def test_quantized_checkpoints_are_expanded(tmp_path: Path) -> None:
    """FP8 with a scale for each matrix, as its definition says: the value times the scale."""
    model = GPT_NEOX.model()
    expected = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith("gpt_neox.layers") and name.endswith("weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.reshape(1)
            expected[name] = tensors[name].float() * scale
        else:
            tensors[name] = value
    model.config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GPTNeoXForCausalLM"], quantization_config={"quant_method": "fp8"})
    save_file(tensors, tmp_path / "model.safetensors")
    executor = executor_at(tmp_path)
    model.load_state_dict(expected)
    driver = Driver(executor)  # type: ignore[arg-type]
    (tokens,) = prompts(211, (40,))
    (logits,) = driver.step([(driver.add(tokens), 40)])
    torch.testing.assert_close(logits, reference(model, tokens), rtol=0, atol=1e-4)
    assert "FP8" in inspect(tmp_path).quantization


# --- what is wrong with a checkpoint -----------------------------------------------------------------------------


def damage(folder: Path, change: Any) -> Path:
    """`folder` with its tensors changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def test_all_faults_of_a_checkpoint_are_told_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["gpt_neox.layers.1.attention.dense.weight"]
        tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"] = torch.zeros(64, 95)
        tensors["gpt_neox.layers.7.unknown"] = torch.zeros(3)

    damage(GPT_NEOX.save(tmp_path), change)
    with pytest.raises(ModelFormatError) as caught:
        open_described(tmp_path)
    message = str(caught.value)
    assert "missing: gpt_neox.layers.1.attention.dense.weight;" in message
    assert "wrong shape: gpt_neox.layers.2.mlp.dense_4h_to_h.weight is [64, 95] instead of [64, 96];" in message
    assert message.endswith("not part of it: gpt_neox.layers.7.unknown")


def test_types_that_torch_cannot_take_are_told(tmp_path: Path) -> None:
    damage(GPT_NEOX.save(tmp_path), lambda tensors: tensors.update(codes=torch.zeros(4).to(torch.float8_e4m3fn)))
    with pytest.raises(ModelFormatError, match=r"unsupported types: codes \(F8_E4M3\)"):
        open_described(tmp_path)


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (ForeignCase("Bloom", {"vocab_size": 211, "hidden_size": 64, "n_layer": 2, "n_head": 4}), {}, "be replaced"),
        (ForeignCase("Mamba", {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2}), {}, "other state"),
        (ForeignCase("Bert", {**SIZES}, "LMHeadModel"), {"is_decoder": False}, "looks ahead"),
        (GPT_NEOX, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rotary"),
        (GPT_NEOX, {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
    ],
    ids=["alibi", "state", "encoder", "dynamic", "chunks"],
)
def test_what_does_not_fit_is_declined_with_the_reason(
    case: ForeignCase, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    case.save(tmp_path, **options)
    with pytest.raises(UnknownArchitectureError, match=reason):
        open_described(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nobody_knows_it"}, "does not know it either"),
        ({"model_type": "new", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "code that comes .* is never run"),
        ({"architectures": ["GPTNeoXForTokenClassification"]}, "no causal language model"),
        ({"model_type": "gpt2"}, "another model's"),
        ({"quantization_config": {"quant_method": "exotic"}}, "quantized with exotic"),
        ({"num_attention_heads": "many"}, "is refused by transformers"),
    ],
    ids=["unknown", "own code", "no_text", "mixed", "quantized", "mistyped"],
)
def test_configurations_that_cannot_be_served_are_refused(
    changes: dict[str, Any], reason: str, gpt_neox: Path, tmp_path: Path
) -> None:
    for file in gpt_neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelFormatError, match=reason):
        open_described(tmp_path)


def test_a_configuration_chooses_no_code(gpt_neox: Path, tmp_path: Path) -> None:
    for file in gpt_neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(
        tmp_path,
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        attn_implementation="somebody/kernel",
        _attn_implementation="somebody/kernel",
        experts_implementation="somebody/kernel",
        fusion_config={"patch_embeddings": True},
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    loader = open_described(tmp_path)
    assert isinstance(loader, foreign.ForeignLoader)
    assert loader.load(torch.float32, torch.device("cpu")).name == "GPTNeoXForCausalLM"


def test_a_model_whose_logits_differ_is_refused(gpt_neox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of layers that carry something from token to token beside attention, which nothing above has shown."""

    def forward(self: foreign.ForeignModel, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.roll(original(self, token_ids), 1, 0)

    original = foreign.ForeignModel.reference
    monkeypatch.setattr(foreign.ForeignModel, "reference", forward)
    with pytest.raises(ModelFormatError, match="logits differ by"):
        executor_at(gpt_neox)


def test_opening_imports_nothing_of_transformers(gpt_neox: Path) -> None:
    checkpoint = open_model(gpt_neox)
    assert isinstance(checkpoint, ForeignCheckpoint)
    assert checkpoint.architecture == "GPTNeoXForCausalLM"
    assert checkpoint.weight_bytes == 4 * checkpoint.parameters


def test_without_transformers_the_refusal_says_how_to_get_it(gpt_neox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnknownArchitectureError, match=r"pip install 'aphrodite-engine\[transformers\]'"):
        open_model(gpt_neox)
