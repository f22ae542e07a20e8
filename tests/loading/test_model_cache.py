"""The cache of models: what is listed, what removal takes and what it leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aphrodite.cli.main import app
from aphrodite.errors import ConfigError
from aphrodite.loading.model_cache import cached_models, find_snapshot, hub_cache, plan_removal, remove

COMMITS = {"main": "a" * 40, "next": "b" * 40}


def put(cache: Path, repo: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """Files of a repository as huggingface-hub lays them out; equal files share a blob."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMITS[revision]
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMITS[revision])
    for name, content in files.items():
        blob = folder / "blobs" / f"{hash(content) & (2**64 - 1):x}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    put(tmp_path / "hub", "org/a-gguf", {"a.Q4_K_M.gguf": b"4" * 400, "a.Q8_0.gguf": b"8" * 800})
    put(tmp_path / "hub", "org/b", {"config.json": b"{}", "model.safetensors": b"m" * 600})
    put(tmp_path / "hub", "org/b", {"config.json": b"{}", "model.safetensors": b"n" * 500}, "next")
    return tmp_path / "hub"


def names(cache: Path) -> dict[str, tuple[str, int]]:
    return {model.name: (model.format, model.size) for model in cached_models(cache)}


def blobs(cache: Path, repo: str) -> int:
    return len(list((cache / f"models--{repo.replace('/', '--')}" / "blobs").iterdir()))


def test_models_are_listed_by_the_name_that_runs_them(cache: Path) -> None:
    assert names(cache) == {
        "org/a-gguf:Q4_K_M": ("GGUF", 400),
        "org/a-gguf:Q8_0": ("GGUF", 800),
        "org/b": ("safetensors", 602),
        "org/b@next": ("safetensors", 502),
    }


def test_what_is_incomplete_is_listed_as_that(cache: Path) -> None:
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    put(cache, "org/c", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()})
    put(cache, "org/d", {"d-Q6_K-00001-of-00002.gguf": b"d" * 30})
    (cache / "models--org--d/blobs/abc.aphrodite.incomplete").write_bytes(b"1234")
    found = cached_models(cache)
    assert [(m.name, m.format, m.size) for m in found if m.format == "incomplete"] == [
        ("org/c", "incomplete", 2 + len(json.dumps(index))),
        ("org/d", "incomplete", 30),
        ("org/d", "incomplete", 4),
    ]


def test_snapshots_are_found_by_revision_and_commit(cache: Path) -> None:
    for revision in ("next", COMMITS["next"], COMMITS["next"][:8]):
        found = find_snapshot(cache, "org/b", revision)
        assert found is not None
        assert found.commit == COMMITS["next"]
    assert find_snapshot(cache, "org/b", "other") is None
    assert find_snapshot(cache, "org/none", "main") is None


def test_one_gguf_model_is_removed_and_the_others_stay(cache: Path) -> None:
    removal = plan_removal(cache, "org/a-gguf", variant="q4_k_m", revision=None)
    assert (removal.names, removal.size) == (("org/a-gguf:Q4_K_M",), 400)
    remove(removal)
    assert set(names(cache)) == {"org/a-gguf:Q8_0", "org/b", "org/b@next"}
    assert blobs(cache, "org/a-gguf") == 1
    remove(plan_removal(cache, "org/a-gguf", variant="a.Q8_0.gguf", revision=None))
    assert not (cache / "models--org--a-gguf").exists()


def test_one_revision_is_removed_and_shared_files_stay(cache: Path) -> None:
    removal = plan_removal(cache, "org/b", variant=None, revision="next")
    assert (removal.names, removal.size) == (("org/b@next",), 500)
    remove(removal)
    assert names(cache)["org/b"] == ("safetensors", 602)
    assert "org/b@next" not in names(cache)
    assert blobs(cache, "org/b") == 2


def test_a_whole_repository_is_removed(cache: Path) -> None:
    removal = plan_removal(cache, "org/b", variant=None, revision=None)
    assert removal.size == 600 + 500 + 2 + 2 * 40  # with what the references say
    remove(removal)
    assert not (cache / "models--org--b").exists()


@pytest.mark.parametrize(
    ("repo", "variant", "revision"), [("org/none", None, None), ("org/b", None, "old"), ("org/a-gguf", "Q2_K", None)]
)
def test_what_is_not_there_cannot_be_removed(cache: Path, repo: str, variant: str | None, revision: str | None) -> None:
    with pytest.raises(ConfigError, match="in the cache"):
        plan_removal(cache, repo, variant=variant, revision=revision)


def test_the_commands(cache: Path) -> None:
    def run(*arguments: str, given: str | None = None) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["models", *arguments], input=given)
        return done.exit_code, done.stdout

    code, table = run("ls")
    assert code == 0
    assert "org/a-gguf:Q8_0" in table
    assert "just now" in table
    assert "://" not in table
    code, text = run("ls", "--json")
    assert {model["name"] for model in json.loads(text)} == set(names(cache))
    assert run("rm", "org/a-gguf:Q8_0", given="n\n")[0] == 1
    assert "org/a-gguf:Q8_0" in names(cache)
    assert run("rm", "org/a-gguf:Q8_0", "--yes")[0] == 0
    assert run("rm", "org/b", given="y\n")[0] == 0
    assert set(names(cache)) == {"org/a-gguf:Q4_K_M"}


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub_cache() == tmp_path / "x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert hub_cache() == tmp_path / "h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert hub_cache() == tmp_path / "c"
    assert hub_cache(tmp_path / "own") == tmp_path / "own/hub"
