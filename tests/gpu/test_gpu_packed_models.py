"""Models whose layers are packed on the GPU, from a checkpoint to tokens, against the CPU's expanded float32 ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_engines import REFERENCE
from test_gpu_models import QWEN3, model, run  # noqa: F401 (a fixture)

from aphrodite.engine import build_order
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.quantization.at_load import QuantizedWeights
from aphrodite.sampling.params import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
# Kernels by numbers of rows and graphs have tests of their own; a start without takes a fraction of the time.
FEW_KERNELS = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "enable_graphs": False}


@pytest.mark.parametrize(
    ("kind", "in_blocks"),
    [("int4", True), ("int4", False), ("int8", True), ("int8", False)],
)
def test_tokens_are_those_of_the_expanded_weights(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,  # noqa: F811
    kind: str,
    in_blocks: bool,
) -> None:
    monkeypatch.setattr(
        build_order,
        "QuantizedWeights",
        lambda weights, kind, on_host: QuantizedWeights(weights, kind, on_host=in_blocks),
    )

    def tokens(**settings: str) -> dict[str, list[int]]:
        answers: dict[str, list[int]] = {}
        built, updates = run(model, GREEDY, dtype="float32", quantization=kind, **FEW_KERNELS, **settings)
        for update in updates:
            answers.setdefault(update.request_id, []).extend(update.token_ids)
        sizes.append(built.info.weight_bytes)
        return answers

    sizes: list[int] = []
    found = tokens()
    assert found == tokens(**REFERENCE)
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q5_K", "Q3_K", "IQ2_XS", "IQ3_S", "TQ2_0"])
def test_a_model_in_k_blocks_answers_with_its_embedding_packed(tmp_path: Path, file_type: str) -> None:
    quantization = {"quant_method": "gguf", "file_type": file_type}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "quantization_config": quantization}))
    stored = open_checkpoint(tmp_path, load_format="dummy").weight_bytes
    built, updates = run(tmp_path, GREEDY, load_format="dummy", **FEW_KERNELS)
    assert sum(len(update.token_ids) for update in updates) == 8 * 16
    assert built.info.weight_bytes <= 1.07 * stored  # norms of a small model count


def test_a_model_of_points_that_is_offloaded_answers_alike(tmp_path: Path) -> None:
    """Layers that take turns on the device share the table of points."""
    quantization = {"quant_method": "gguf", "file_type": "IQ2_XXS"}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "quantization_config": quantization}))

    def tokens(**settings: float) -> list[list[int]]:
        _, updates = run(tmp_path, GREEDY, load_format="dummy", **FEW_KERNELS, **settings)
        return [update.token_ids for update in sorted(updates, key=lambda update: update.request_id)]

    assert tokens(cpu_offload_gb=1.0) == tokens()
