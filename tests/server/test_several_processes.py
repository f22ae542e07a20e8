"""Several models in processes of their own: loaded from a folder within a budget, killed, brought back, unloaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from aphrodite.errors import ConfigError
from aphrodite.model_list import offered_models
from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.several import open_pool, summary
from aphrodite.settings import resolve


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def folder(smollm2_path: Path, tmp_path: Path) -> Path:
    """One model under two names, and a file that is damaged."""
    for name in ("tale.Q4_1.gguf", "verse.gguf"):
        (tmp_path / name).symlink_to(smollm2_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    return tmp_path


async def test_models_of_a_folder_come_and_go(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(
        f"models_dir: {folder}\nmodels_memory: 1GiB\nmax_model_len: 256\n"
        "models:\n  - {name: verse, max_model_len: 128, aliases: [poem]}\n"
    )
    settings = resolve(config_file=file, environ={})
    config = ServerConfig.from_settings(settings.server)
    before = children()
    async with open_pool(settings, config, offered_models(settings)) as pool:
        app = Application(pool, config)
        assert "none yet" in summary(pool)[1]
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http:

            async def complete(model: str) -> Any:
                body = {"model": model, "prompt": "The sea", "max_tokens": 3, "seed": 1}
                return (await http.post("/v1/completions", json=body)).json()

            shown = (await http.post("/api/show", json={"model": "tale"})).json()
            assert shown["model_info"]["aphrodite.context_length"] == 256
            assert "<|im_start|>" in shown["template"]
            assert children() == before
            told = (await complete("tale"))["choices"][0]["text"]
            (first,) = children() - before
            assert (await complete("poem"))["choices"][0]["text"] == told  # the same weights
            (second,) = children() - before  # one gave way to the other
            assert second != first
            cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
            assert cards["verse"]["max_model_len"] == 128
            assert cards["tale.Q4_1"]["max_model_len"] == 256
            failed = await complete("broken")
            assert failed["error"]["code"] == "model_load_failed"
            assert str(folder) not in failed["error"]["message"]
            os.kill(second, signal.SIGKILL)
            loaded = pool.find("verse").loaded
            assert loaded is not None
            await loaded.engine.dead.wait()
            assert (await complete("verse"))["choices"][0]["text"] == told
            await pool.unload(pool.find("verse"))
            assert children() == before
    assert children() == before


async def test_a_model_that_always_stays_has_to_fit_at_the_start(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(f"models_dir: {folder}\nmodels_memory: 64MiB\nmodels: [{{name: verse, pinned: true}}]\n")
    settings = resolve(config_file=file, environ={})
    with pytest.raises(ConfigError, match=r"needs .* there are 64\.0 MiB for models \(--models-memory\)"):
        async with open_pool(settings, ServerConfig(), offered_models(settings)):
            pass


def test_the_command_serves_a_folder_and_loads_nothing_by_itself(folder: Path) -> None:
    command = [sys.executable, "-m", "aphrodite.cli", "run", "--models-dir", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = ""
    while "Ready after" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    assert "Models    broken, tale.Q4_1, verse" in told
    url = told.rpartition(" s at ")[2].split()[0]
    names = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
    assert names == ["broken", "tale.Q4_1", "tale", "verse"]
    assert httpx.post(f"{url}/v1/model/load", json={"model_name": "verse"}).status_code == 403
    assert len(psutil.Process(process.pid).children()) == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    process.stderr.close()
