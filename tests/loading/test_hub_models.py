"""Models by name, from a hub on loopback: what is fetched, where it goes on, and every refusal in one line."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, OTHER_COMMIT, Hub, Repository, running_hub
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from aphrodite.cli.main import app
from aphrodite.config import EngineConfig
from aphrodite.engine.preparation import resolve_model, tokenizer_path
from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.llm import LLM
from aphrodite.loading import downloads
from aphrodite.loading.checkpoint import LoadFormat
from aphrodite.loading.hub import Fetched, ModelName, fetch, parse_name
from aphrodite.loading.model_cache import cached_models, hub_cache
from aphrodite.loading.repository import Room
from aphrodite.sampling.params import SamplingParams

REPO = "writers/tiny"


def large(seed: int, size: int = 40_000) -> bytes:
    return bytes((index * (2 * seed + 3) + index // 251) % 256 for index in range(size))


def safetensors_repository() -> Repository:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    return Repository(
        {
            "README.md": b"text",
            "config.json": b"{}",
            "tokenizer.json": b'{"tokens": []}',
            "tokenizer.model": b"not needed beside tokenizer.json",
            "pytorch_model.bin": large(9),
            "original/consolidated.safetensors": large(8),
            "onnx/model.onnx": large(7),
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00002.safetensors": large(1),
            "model-00002-of-00002.safetensors": large(2),
        },
        {"config.json": b'{"branch": "next"}', "model.safetensors": large(3)},
    )


def gguf_repository() -> Repository:
    return Repository(
        {
            "tiny.Q2_K.gguf": large(1, 5_000),
            "tiny.Q4_K_M.gguf": large(2, 10_000),
            "tiny.Q8_0.gguf": large(3, 20_000),
            "big/tiny-F16-00001-of-00002.gguf": large(4, 30_000),
            "big/tiny-F16-00002-of-00002.gguf": large(5, 30_000),
            "mmproj-tiny-F16.gguf": large(6, 5_000),
        }
    )


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub in its first state, as this process's hub; no token, an empty cache."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", shared_hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(downloads, "_WAIT", 0.001)
    monkeypatch.setattr(downloads, "_CHUNK", 500)
    repositories = {REPO: safetensors_repository(), "writers/tiny-gguf": gguf_repository()}
    fresh = Hub(port=shared_hub.port, repositories=repositories)
    for name in ("repositories", "requests", "breaks", "sends_parts", "damages", "refuses_bytes"):
        setattr(shared_hub, name, getattr(fresh, name))
    return shared_hub


def get(
    name: str, *, load_format: LoadFormat = "auto", memory: int = 1 << 40, cache_dir: Path | None = None
) -> Fetched:
    parsed = parse_name(name)
    assert parsed is not None
    return fetch(parsed, cache_dir=cache_dir, load_format=load_format, room=lambda: Room(memory, "memory"))


def test_only_what_is_needed_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    path, load_format = get(REPO)
    assert load_format == "safetensors"
    assert path == tmp_path / "home/hub/models--writers--tiny/snapshots" / COMMIT
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    needed = {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    assert hub.fetched() == needed == {file.name for file in path.iterdir()}
    assert (path / "model-00002-of-00002.safetensors").read_bytes() == large(2)
    hub.requests.clear()
    assert get(REPO) == (path, load_format)
    assert hub.fetched() == set()


def test_a_revision_is_fetched_beside_the_main_branch(hub: Hub) -> None:
    main, other = get(REPO).path, get(f"{REPO}@next").path
    assert other.name == OTHER_COMMIT != main.name
    assert json.loads((other / "config.json").read_bytes()) == {"branch": "next"}
    assert get(f"{REPO}@{OTHER_COMMIT}").path == other


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("writers/tiny-gguf:Q8_0", ["tiny.Q8_0.gguf"]),
        ("writers/tiny-gguf:q2_k@main", ["tiny.Q2_K.gguf"]),
        ("writers/tiny-gguf:tiny.Q4_K_M.gguf", ["tiny.Q4_K_M.gguf"]),
        ("writers/tiny-gguf:F16", ["big/tiny-F16-00001-of-00002.gguf", "big/tiny-F16-00002-of-00002.gguf"]),
    ],
)
def test_a_variant_is_one_gguf_model(name: str, files: list[str], hub: Hub) -> None:
    path, load_format = get(name)
    assert load_format == "gguf"
    assert str(path).endswith(files[0])
    assert hub.fetched() == set(files)


def test_without_a_variant_the_best_that_fits_is_chosen_and_said(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aphrodite"):
        assert get("writers/tiny-gguf").path.name == "tiny.Q4_K_M.gguf"
        assert get("writers/tiny-gguf", memory=(1 << 29) + 7_000).path.name == "tiny.Q2_K.gguf"
        assert get("writers/tiny-gguf", memory=100).path.name == "tiny.Q2_K.gguf"
    assert "Q4_K_M (0.0 MB), the first in order of preference that fits" in caplog.text
    assert "the smallest, though none fits 0.0 MB of free memory" in caplog.text
    assert "it also has F16, Q2_K, Q8_0 (name one: writers/tiny-gguf:F16)" in caplog.text


def test_an_interrupted_download_goes_on_where_it_broke_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_ATTEMPTS", 1)
    hub.breaks = [12_000, 0]
    with pytest.raises(AphroditeError, match=r"broke off after .* what has come is kept: run the same again"):
        get("writers/tiny-gguf:Q8_0")
    (partial,) = cached_models(hub_cache())
    assert (partial.name, partial.format, partial.size) == ("writers/tiny-gguf", "incomplete", 12_000)
    path = get("writers/tiny-gguf:Q8_0").path
    assert path.read_bytes() == large(3, 20_000)
    assert hub.parts() == ["", "bytes=12000-", "bytes=12000-"]
    assert [model.format for model in cached_models(hub_cache())] == ["GGUF"]


def test_who_listens_hears_of_every_byte_and_may_end_it(hub: Hub) -> None:
    heard: list[tuple[int, int]] = []
    name, wanted = ModelName("writers/tiny-gguf", "Q8_0"), [10_000]

    def listener(come: int, total: int) -> None:
        heard.append((come, total))
        if come >= wanted[0]:
            raise downloads.DownloadCancelledError("enough")

    def listened() -> Fetched:
        room = Room(1 << 40, "memory")
        return fetch(name, cache_dir=None, load_format="auto", room=lambda: room, listener=listener)

    with pytest.raises(downloads.DownloadCancelledError, match="enough"):
        listened()
    assert heard[-1] == (10_000, 20_000)
    heard.clear()
    wanted[0] = 30_000
    assert listened().path.read_bytes() == large(3, 20_000)
    assert heard[0] == (10_000, 20_000)  # what had come before
    assert heard[-1] == (20_000, 20_000)


def test_a_broken_connection_is_taken_up_again(hub: Hub) -> None:
    hub.breaks = [9_000, 500, 0, 0, 0]
    assert get("writers/tiny-gguf:Q8_0").path.read_bytes() == large(3, 20_000)
    assert len(hub.parts()) == 6


def test_a_server_that_sends_no_parts_is_asked_for_all_of_it(hub: Hub) -> None:
    hub.breaks, hub.sends_parts = [9_000], False
    assert get("writers/tiny-gguf:Q8_0").path.read_bytes() == large(3, 20_000)


def test_what_http_does_not_bring_is_left_to_the_hubs_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_LARGEST", 100)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert get("writers/tiny-gguf:Q8_0").path.read_bytes() == large(3, 20_000)


def test_bytes_with_another_hash_are_not_kept(hub: Hub) -> None:
    hub.damages = True
    with pytest.raises(ConfigError, match="came damaged"):
        get("writers/tiny-gguf:Q8_0")
    assert cached_models(hub_cache()) == []
    hub.damages = False
    assert get("writers/tiny-gguf:Q8_0").path.read_bytes() == large(3, 20_000)


def test_a_token_goes_to_the_hub_and_not_to_where_it_redirects(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].access = "private"
    monkeypatch.setenv("HF_TOKEN", "good-token")
    get(REPO)
    sent = {path.split("/")[1] for _, path, headers in hub.requests if "authorization" in headers}
    assert sent == {"api", "writers"}
    assert any(path.startswith("/store/") for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("name", "access", "token", "words"),
    [
        ("nobody/nothing", "public", None, "has no model nobody/nothing, or it is private"),
        (REPO, "private", None, "or it is private: check the spelling, or set HF_TOKEN"),
        (REPO, "private", "bad-token", "or it is private"),
        (REPO, "gated", None, "is gated: accept its terms .* set HF_TOKEN"),
        (REPO, "gated", "bad-token", "is gated"),
        (f"{REPO}@none", "public", None, "has no revision none"),
        (f"{REPO}:Q4_K_M", "public", None, "has no GGUF files"),
        ("writers/tiny-gguf:Q5_K_M", "public", None, "has no Q5_K_M; it has F16, Q2_K, Q4_K_M, Q8_0"),
    ],
)
def test_refusals_are_one_clear_line(
    name: str, access: str, token: str | None, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO].access = access
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=words) as caught:
        get(name)
    assert "\n" not in str(caught.value)


def test_a_refusal_of_the_bytes_is_told(hub: Hub) -> None:
    hub.refuses_bytes = 403
    with pytest.raises(AphroditeError, match="refuses access to writers/tiny-gguf"):
        get("writers/tiny-gguf:Q8_0")


def test_a_full_disk_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(ConfigError, match=r"GB free: make room, or name another place with --cache-dir or HF_HOME"):
        get("writers/tiny-gguf:Q8_0")
    assert hub.fetched() == set()


def test_a_disk_that_fills_up_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, have: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads._Stream, "_receive", full)
    with pytest.raises(ConfigError, match=r"cannot write to .*: No space left on device"):
        get("writers/tiny-gguf:Q8_0")


@pytest.mark.parametrize("how", ["forbidden", "gone"])
def test_the_cache_serves_without_a_network(
    how: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = (REPO, f"{REPO}@next", "writers/tiny-gguf:F16")
    online = [get(name) for name in names]
    hub.requests.clear()
    if how == "forbidden":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        with socket.socket() as taken:  # a port that nobody listens on
            taken.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    with caplog.at_level(logging.INFO, logger="aphrodite"):
        assert [get(name) for name in names] == online
        assert get("writers/tiny-gguf").path == online[2].path  # of what is here
        with pytest.raises(
            ConfigError, match=r"other/model is not on this machine; .*(cannot be reached|HF_HUB_OFFLINE)"
        ):
            get("other/model")
    assert hub.requests == []
    assert "HF_HUB_OFFLINE is set" in caplog.text or "as it is in the cache" in caplog.text


def test_what_is_only_in_part_here_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (get(REPO).path / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"only in part on this machine \(model-00002-of-00002.safetensors missing\)"):
        get(REPO)


def test_files_that_a_server_would_put_elsewhere_do_not_exist(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["evil/one"] = Repository({"../../../evil.gguf": large(1), "/tmp/evil.gguf": large(2)})
    with pytest.raises(ConfigError, match="neither safetensors nor GGUF"):
        get("evil/one")


def test_a_cache_of_ones_own(hub: Hub, tmp_path: Path) -> None:
    path = get(REPO, cache_dir=tmp_path / "own").path
    assert path.is_relative_to(tmp_path / "own" / "hub")
    assert not (tmp_path / "home" / "hub").exists()


def test_dummy_weights_need_only_a_description(hub: Hub) -> None:
    assert get(REPO, load_format="dummy").load_format == "dummy"
    assert hub.fetched() == {"config.json", "tokenizer.json"}


def test_an_engine_takes_a_name(hub: Hub, tiny_model: Path, smollm2_path: Path) -> None:
    hub.repositories["writers/llama"] = Repository({"config.json": (tiny_model / "config.json").read_bytes()})
    with LLM(
        "writers/llama", load_format="dummy", device="cpu", tokenizer=str(smollm2_path), kv_cache_memory=1 << 22
    ) as llm:
        assert llm.info.model == "llama"
        answer = llm.generate([[1, 5, 9]], SamplingParams(max_tokens=3, ignore_eos=True), progress=False)
    assert len(answer[0].outputs[0].token_ids) == 3


def test_the_command_line_fetches_lists_inspects_and_removes(hub: Hub, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "made")
    files = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    hub.repositories["writers/llama"] = Repository(files)

    def run(*arguments: str, given: str | None = None) -> str:
        done = CliRunner().invoke(app, ["models", *arguments], input=given, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    with pytest.raises(ConfigError, match="not on this machine; fetch it: aphrodite models pull writers/llama"):
        run("inspect", "writers/llama")
    folder = run("pull", "writers/llama").strip()
    assert Path(folder, "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "writers/llama" in run("ls")
    assert "LlamaForCausalLM" in run("inspect", "writers/llama")
    assert "Removed writers/llama" in run("rm", "writers/llama", given="y\n")
    assert "No models" in run("ls")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", ModelName("org/name")),
        ("org/name:Q4_K_M", ModelName("org/name", "Q4_K_M")),
        ("org/name@v1.0", ModelName("org/name", None, "v1.0")),
        ("org/name:Q4_K_M@refs/pr/1", ModelName("org/name", "Q4_K_M", "refs/pr/1")),
        ("org/name@main:sub/model.gguf", ModelName("org/name", "sub/model.gguf", "main")),
        ("https://huggingface.co/org/name", ModelName("org/name")),
        ("https://huggingface.co/org/name/tree/main", ModelName("org/name")),
        ("https://huggingface.co/org/name/tree/main/UD-Q4_K_XL/", ModelName("org/name", "UD-Q4_K_XL")),
        ("https://hf.co/org/name/tree/next?not-for-all=1", ModelName("org/name", None, "next")),
        ("https://huggingface.co/org/name/blob/main/sub/m-Q8_0.gguf", ModelName("org/name", "sub/m-Q8_0.gguf")),
        ("huggingface.co/org/name/resolve/v1/m.gguf?download=true", ModelName("org/name", "m.gguf", "v1")),
        ("https://huggingface.co/org/name/blob/main/config.json", ModelName("org/name")),
        ("hf.co/org/name:Q4_K_M", ModelName("org/name", "Q4_K_M")),
        ("https://example.com/org/name", None),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/na..me", None),
        ("model.gguf", None),
        (r"C:\models\x", None),
    ],
)
def test_names(text: str, name: ModelName | None) -> None:
    assert parse_name(text) == name
    if name is not None:
        assert parse_name(str(name)) == name


@pytest.mark.parametrize("text", ["o/n:A:B", "o/n@a@b", "o/n@../x", "o/n:/etc/x"])
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_name(text)


def test_a_path_that_exists_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_name("org/name") is None


def test_a_file_that_is_not_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_name("models/tale.gguf") == ModelName("models/tale.gguf")  # may be a repository
    (tmp_path / "models").mkdir()
    assert parse_name("models/tale.gguf") is None
    assert parse_name("models/tale:tale-Q8_0.gguf") == ModelName("models/tale", "tale-Q8_0.gguf")
    with pytest.raises(ConfigError, match=r"models/tale\.gguf: there is no such file or folder"):
        resolve_model(EngineConfig(model="models/tale.gguf"))


def test_the_home_of_a_user_who_is_not_there_is_no_path() -> None:
    with pytest.raises(ConfigError, match=r"^~nobody-of-this-name/tale\.gguf: there is no such file or folder"):
        resolve_model(EngineConfig(model="~nobody-of-this-name/tale.gguf"))
    assert tokenizer_path(EngineConfig(tokenizer="~nobody-of-this-name/t.json")) == Path("~nobody-of-this-name/t.json")
