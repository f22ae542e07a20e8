"""benchmarks/gpu.py from its command line to its results, on a CPU and a model of a few kilobytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.tokenizer.loader import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "eos_token_id": 5,
}


@pytest.mark.parametrize(
    ("shape", "parameters", "kv_bytes"),
    [("llama-3.1-8b", 8_030_261_248, 131_072), ("qwen3-0.6b", 596_049_920, 114_688)],
)
def test_shapes_are_those_of_the_public_models(shape: str, parameters: int, kv_bytes: int) -> None:
    checkpoint = open_checkpoint(ROOT / "benchmarks" / "configs" / shape, load_format="dummy")
    spec = checkpoint.spec
    assert (checkpoint.name, checkpoint.parameters) == (shape, parameters)
    assert 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 == kv_bytes


def test_rows_come_with_figures_and_a_failing_case_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), str(tmp_path), "--device", "cpu"]
    command += ["--only", "start", "ttft", "long", "--max-model-len", "4096", "--set", "kv_cache_memory=64MiB"]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = {row["case"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ["start", "ttft", "long"]
    for case, unit in (("start", "s"), ("ttft", "ms")):
        assert rows[case]["error"] is None
        assert rows[case]["unit"] == unit
        assert rows[case]["value"] > 0
        assert case in run.stdout
    assert "context length is 4096" in rows["long"]["error"]  # 32k tokens do not fit
    assert rows["long"]["error"][:60] in run.stdout


def test_the_made_up_tokenizer_has_as_many_words_as_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gpu_machine import write_tokenizer as w; w(Path(sys.argv[1]), 900)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120, check=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 900
    assert tokenizer.eos_token_ids == ()
