"""A GPU that is full or fails: who wants too much is told so, and nobody else is harmed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_engines import TINY, Engines, write_model
from test_gpu_engine import GREEDY, PROMPTS, add, answers, drain, updates

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import BuiltEngine, build_engine
from aphrodite.errors import ConfigError
from aphrodite.sampling.params import SamplingParams

GIB = 1 << 30
LARGE = {**TINY, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16}


@pytest.fixture
def limited() -> Iterator[Any]:
    """Lets torch have so many bytes of the card, and all again afterwards."""

    def limit(nbytes: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.mem_get_info()[1])

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def built(path: Path, config: dict[str, Any], **settings: Any) -> BuiltEngine:
    """An engine with random weights of a shape."""
    (path / "config.json").write_text(json.dumps(config))
    chosen = {"device": "cuda", "load_format": "dummy", "max_num_seqs": 16, **settings}
    return build_engine(EngineConfig(model=str(path), **chosen), ())


def test_a_model_that_is_too_large_is_refused_in_one_line(tmp_path: Path, limited: Any) -> None:
    limited(GIB)
    with pytest.raises(ConfigError, match=r"the weights do not fit the GPU: .* as they are stored.*--cpu-offload-gb"):
        built(tmp_path, LARGE)
    torch.cuda.empty_cache()


def test_the_context_fits_itself_to_the_memory(tmp_path: Path) -> None:
    engine = built(tmp_path, {**TINY, "max_position_embeddings": 1 << 20}, kv_cache_memory=64 << 20)
    try:
        longest = engine.info.max_model_len
        assert longest < 1 << 20
        assert f"{longest:,} tokens a chat" in "\n".join(engine.info.memory_plan)
        add(engine.core, "long", [3] * (longest - 8), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
        assert len(drain(engine.core)["long"]) == 8
    finally:
        engine.core.close()


def test_running_out_of_memory_in_a_step_ends_its_requests_only(tmp_path: Path, limited: Any) -> None:
    engines = Engines(write_model(tmp_path, TINY), max_model_len=33_000, max_num_batched_tokens=32_768)
    core = engines()
    expected = answers(core, GREEDY)
    add(core, "long", [3] * 30_000, GREEDY)
    torch.cuda.empty_cache()
    limited(torch.cuda.memory_reserved() + (8 << 20))
    errors = [update.error for update in updates(core) if update.error]
    limited(torch.cuda.mem_get_info()[1])
    assert len(errors) == 1
    assert answers(core, GREEDY) == expected
    engines.close()


def test_log_probabilities_of_a_long_prompt_need_no_room_for_all_logits(tmp_path: Path) -> None:
    """On a card that is full, of a vocabulary that makes 2 GB of a step's logits, and a neighbour that goes on."""
    engine = built(tmp_path, {**TINY, "vocab_size": 128_256}, dtype="bfloat16", max_model_len=9000)
    try:
        filler = torch.empty(max(0, torch.cuda.mem_get_info()[0] - 2 * GIB), dtype=torch.uint8, device="cuda")
        prompt = [(7 * place) % 100_000 for place in range(8_000)]
        add(engine.core, "scored", prompt, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
        add(engine.core, "neighbour", PROMPTS[0], GREEDY)
        found = list(updates(engine.core))
        assert [update.error for update in found if update.error] == []
        assert sum(len(update.prompt_logprobs or []) for update in found) == len(prompt) - 1
        del filler
    finally:
        engine.core.close()
        torch.cuda.empty_cache()


LOST = """
import sys
import torch
from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.messages import AddRequest
from aphrodite.errors import EngineDeadError
from aphrodite.sampling.params import SamplingParams

config = EngineConfig(model=sys.argv[1], device="cuda", dtype="float32", kv_cache_memory=1 << 28, max_num_seqs=16)
core = build_engine(config, ()).core
core.add(AddRequest(["a"], [0], [5] * 40, SamplingParams(max_tokens=8), 0, None))
core.step()
torch.zeros(1, device="cuda")[torch.full((1,), 1 << 30, device="cuda")]  # a fault that stays
try:
    while core.has_work():
        core.step()
except EngineDeadError as error:
    print("lost:", error)
core.close()
"""


def test_a_fault_of_the_device_ends_the_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOST, str(write_model(tmp_path, TINY))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "lost: the GPU failed (CUDA error" in run.stdout, run.stdout + run.stderr[-2000:]
