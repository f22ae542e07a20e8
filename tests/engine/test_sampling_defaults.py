"""What the model's authors recommend holds where a request names nothing, from the checkpoint to the LLM."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from aphrodite.engine.sampling_defaults import sampling_defaults
from aphrodite.errors import ConfigError
from aphrodite.llm import LLM
from aphrodite.loading.generation import GenerationDefaults
from aphrodite.sampling.params import SamplingParams


def test_recommended_values_become_defaults_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    recommended = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, eos_token_ids=(2,))
    with caplog.at_level(logging.INFO):
        defaults = sampling_defaults(recommended, source="auto")
    assert defaults == SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    assert "temperature 0.6, top_p 0.95, top_k 20 (" in caplog.text
    assert "--generation-config none" in caplog.text


@pytest.mark.parametrize(
    ("recommended", "source"),
    [(GenerationDefaults(temperature=0.6), "none"), (GenerationDefaults(temperature=1.0, top_k=-1), "auto")],
)
def test_nothing_is_logged_where_nothing_changes(
    recommended: GenerationDefaults, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert sampling_defaults(recommended, source=source) == SamplingParams()
    assert not caplog.records


def test_a_value_out_of_bounds_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"temperature.*--generation-config none"):
        sampling_defaults(GenerationDefaults(temperature=1e6), source="auto")


@pytest.mark.parametrize("source", ["auto", "none"])
def test_an_llm_without_parameters_takes_the_models_own(
    tiny_model: Path, smollm2_path: Path, tmp_path: Path, source: str
) -> None:
    """The recommendation makes the choice greedy, so it shows in the tokens."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "repetition_penalty": 1.5}))
    settings = {
        "tokenizer": str(smollm2_path),
        "load_format": "dummy",
        "threads": 1,
        "max_num_seqs": 2,
        "kv_cache_memory": 1 << 20,
    }
    with LLM(model, generation_config=source, **settings) as llm:
        greedy = SamplingParams(temperature=0.0, repetition_penalty=1.5)
        assert llm.sampling_defaults == (greedy if source == "auto" else SamplingParams())
        if source == "auto":
            prompt = [3, 4, 5]
            own = llm.generate(prompt, progress=False)[0].outputs[0].token_ids
            assert own == llm.generate(prompt, greedy, progress=False)[0].outputs[0].token_ids
