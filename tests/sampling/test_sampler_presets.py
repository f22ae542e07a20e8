"""Sampler presets: the shipped ones are sound, a file's join and replace them, and what is wrong is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aphrodite.errors import ConfigError
from aphrodite.sampling.fields import validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import load_presets, shipped_presets

FILE = """
presets:
  mine:
    about: My own.
    default: {min_p: 0.1, temperature: 0.5}
    override: {top_k: 40}
    force: {rep_pen: 1.2}
  story:
    override: {temperature: 0.9}
keys:
  secret-key: mine
"""


def test_a_dozen_ship_each_with_a_line_on_what_it_is_for() -> None:
    shipped = shipped_presets().presets
    assert len(shipped) >= 12
    for preset in shipped.values():
        params = preset.base(SamplingParams(temperature=0.2, top_k=3, min_p=0.4, repetition_penalty=1.3))
        validate(params, vocab_size=1000, max_model_len=1000, max_logprobs=20)
        assert len(preset.about) > 20
        # What a model's authors recommend for their own recipe must not stay in one that is not theirs.
        assert (params.min_p, params.repetition_penalty) != (0.4, 1.3), preset.name


def test_groups_stand_between_the_models_and_the_requests_values(tmp_path: Path) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text(FILE)
    library = load_presets(file)
    mine = library.presets["mine"]
    assert library.of_key == {hashlib.sha256(b"secret-key").digest(): mine}
    base = mine.base(SamplingParams(temperature=0.7, top_k=20))
    assert (base.temperature, base.min_p, base.top_k) == (0.7, 0.1, 40)  # default yields to the model, override not
    fields, lost = mine.forced({"repeat_penalty": 1.0, "top_k": 5, "rep_pen": None})
    assert fields == {"top_k": 5, "repetition_penalty": 1.2}
    assert lost == ["repeat_penalty"]


def test_a_files_presets_replace_those_of_the_same_name(tmp_path: Path) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text(FILE)
    presets = load_presets(file).presets
    assert dict(presets["story"].override) == {"temperature": 0.9}
    assert set(presets) == {*shipped_presets().presets, "mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets: [1]", "presets: must map names to values"),
        ("presets: {a: {overide: {}}}", "preset 'a': there is no 'overide' here"),
        ("presets: {a: {override: {min_q: 1}}}", "`min_q` is not a sampling parameter. Did you mean `min_p`?"),
        ("presets: {a: {force: {temperature: -1}}}", "preset 'a': force: `temperature`"),
        ("presets: {a: {about: 3}}", "preset 'a': about must be a text"),
        ("keys: {sk-1: nobody}", "keys: there is no preset 'nobody'"),
        ("presets: {a: !!python/object/apply:os.getcwd []}", "not valid YAML"),
        ("models: {}", "there is no 'models' here"),
        ("just text", "must map names to values"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_presets(file)
    assert message in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_presets(tmp_path / "nowhere.yaml")
