"""Which models a server offers: MODEL, the list in the configuration file, a folder; names, aliases, settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aphrodite.errors import ConfigError
from aphrodite.model_list import OfferedModel, has_several, hub_model, offered_models
from aphrodite.settings import Settings, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two quantizations of one model, a split one, a projector, a checkpoint, an adapter, and what is no model."""
    root = tmp_path / "models"
    names = ["tale-8b.Q4_K_M.gguf", "tale-8b.Q8_0.gguf", "verse-Q6_K.gguf", "mmproj-verse.gguf", "notes.txt",
             "long-00001-of-00002.gguf", "long-00002-of-00002.gguf", "torn-00002-of-00003.gguf"]  # fmt: skip
    for directory, file in (("checkpoint", "config.json"), ("single", "x.Q4_0.gguf"), ("empty", "readme.md")):
        names.append(f"{directory}/{file}")
    names += ["adapter/config.json", "adapter/adapter_config.json"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    return root


def settings(tmp_path: Path, *, flags: dict[str, object] | None = None, **content: object) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(content))  # which YAML is a superset of
    return resolve(flags, config_file=file, environ={})


def by_name(models: list[OfferedModel]) -> dict[str, OfferedModel]:
    return {model.name: model for model in models}


def test_a_folder_offers_its_files_and_checkpoints(tmp_path: Path, folder: Path) -> None:
    models = by_name(offered_models(settings(tmp_path, models_dir=str(folder))))
    assert set(models) == {"tale-8b.Q4_K_M", "tale-8b.Q8_0", "verse-Q6_K", "long", "checkpoint", "single"}
    assert models["verse-Q6_K"].aliases == ("verse",)
    assert models["tale-8b.Q8_0"].aliases == ()  # which of the two `tale-8b` is nobody can know
    assert models["long"].engine.model == str(folder / "long-00001-of-00002.gguf")
    assert models["checkpoint"].engine.served_model_name == ("checkpoint",)


def test_a_folder_that_nobody_may_look_into_hides_no_other(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "lost+found").mkdir()
    is_file = Path.is_file

    def guarded(path: Path) -> bool:  # whoever runs tests as root may look into all
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", guarded)
    for _ in range(2):
        models = by_name(offered_models(settings(tmp_path, models_dir=str(folder))))
        assert {"checkpoint", "verse-Q6_K"} <= set(models)
        assert "lost+found" not in models
    assert caplog.text.count("lost+found is passed over: Permission denied") == 1


def test_a_listed_model_has_settings_of_its_own_over_those_of_all(tmp_path: Path, folder: Path) -> None:
    models = by_name(
        offered_models(
            settings(
                tmp_path,
                flags={"max_model_len": "2k", "device": "cpu"},
                models_dir=str(folder),
                keep_alive="5m",
                models=[
                    {
                        "name": "writer",
                        "model": "verse-Q6_K.gguf",
                        "aliases": ["gpt-4o", "w"],
                        "max_model_len": "1K",
                        "sampler-preset": "story",
                        "keep_alive": "1h30m",
                        "chat_template": "chatml",
                    },
                    {"name": "checkpoint", "pinned": True, "tool_parser": "hermes"},
                    {"name": "far", "model": "ORG/NAME:Q4_K_M@main"},
                ],
            )
        )
    )
    assert list(models)[:3] == ["writer", "checkpoint", "far"]
    writer = models["writer"]
    assert (writer.names, writer.pinned) == (("writer", "gpt-4o", "w"), False)
    assert (writer.engine.max_model_len, writer.engine.device, writer.engine.chat_template) == (1024, "cpu", "chatml")
    assert writer.engine.model == str(folder / "verse-Q6_K.gguf")
    assert (writer.server.sampler_preset, writer.server.keep_alive) == ("story", 5400.0)
    assert "verse-Q6_K" not in models  # it is the writer
    pinned = models["checkpoint"]
    assert (pinned.pinned, pinned.server.tool_parser, pinned.server.keep_alive) == (True, "hermes", 300.0)
    assert pinned.engine.max_model_len == 2000
    assert models["far"].engine.model == "ORG/NAME:Q4_K_M@main"


def test_model_comes_first_under_the_name_that_it_has_alone(tmp_path: Path, folder: Path) -> None:
    model = str(folder / "verse-Q6_K.gguf")
    models = offered_models(settings(tmp_path, flags={"model": model}, models_dir=str(folder)))
    assert [entry.name for entry in models].count("verse") == 1
    assert models[0].name == "verse"
    named = {"model": model, "served_model_name": ["poet", "p"]}
    assert offered_models(settings(tmp_path, flags=named, models_dir=str(folder)))[0].names == ("poet", "p")


def test_a_model_below_the_home_folder_is_the_one_that_lies_there(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "v1.5").mkdir()
    (folder / "v1.5" / "config.json").write_text("{}")
    found = offered_models(settings(tmp_path, model=f"~/{folder.name}/v1.5", models_dir=f"~/{folder.name}"))
    assert [model.name for model in found].count("v1.5") == 1
    assert found[0].name == "v1.5"


def test_one_model_is_no_list(tmp_path: Path, folder: Path) -> None:
    assert not has_several(settings(tmp_path, model="a.gguf"))
    assert has_several(settings(tmp_path, models=[{"name": "a", "model": "a.gguf"}]))
    assert has_several(settings(tmp_path, models_dir=str(folder)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"models": {"name": "a"}}, "must be a list"),
        ({"models": []}, "must be a list"),
        ({"models": ["a"]}, "must be a list"),
        ({"models": [{"model": "a.gguf"}]}, "needs a name"),
        ({"models": [{"name": "a", "pinned": "sometimes"}]}, "must be true or false"),
        ({"models": [{"name": "a", "quantisation": "int4"}]}, "Did you mean quantization"),
        ({"models": [{"name": "a", "port": 1}]}, "port is not a setting"),
        ({"models": [{"name": "a", "max_model_len": "x"}]}, "max_model_len: 'x' is not a whole number"),
        ({"models": [{"name": "a"}]}, "names no `model`"),
        ({"models": [{"name": "a", "model": "x"}, {"name": "b", "model": "y", "aliases": ["a"]}]}, "'a': x and y"),
        ({"models": [{"name": "a", "model": "x", "lora": ["poet"]}]}, "--lora poet: write NAME=PATH"),
        ({"models": [{"name": "a", "model": "x"}, {"name": "b", "model": "y", "lora": ["a=z"]}]}, "--lora a: .* x$"),
        ({"models_dir": "/nowhere"}, "cannot read --models-dir /nowhere"),
        ({"models_dir": "~nobody-of-this-name"}, "cannot read --models-dir ~nobody-of-this-name"),
        ({"models": [{"name": "a", "model": "x"}], "served_model_name": ["b"]}, "names MODEL"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(tmp_path: Path, content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offered_models(settings(tmp_path, **content))


def test_an_empty_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no GGUF file"):
        offered_models(settings(tmp_path, models_dir=str(tmp_path / "empty")))
    with_key = settings(tmp_path, models_dir=str(tmp_path / "empty"), admin_key=["k"])
    assert offered_models(with_key) == []  # they can be fetched


def test_a_model_of_the_hub_goes_by_its_whole_name(tmp_path: Path) -> None:
    found = hub_model(settings(tmp_path, max_model_len="1k"), "ORG/NAME:Q4_K_M")
    assert found is not None
    assert (found.name, found.engine.model, found.engine.max_model_len) == ("ORG/NAME:Q4_K_M", "ORG/NAME:Q4_K_M", 1000)
    assert hub_model(settings(tmp_path), "not-a-hub-name") is None
