"""A sampler of another package: the one that docs/samplers.md shows, installed from a folder, used over HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "samplers.md"
BROKEN = """
from aphrodite.sampling.extensions import parameter_row
from aphrodite.sampling.stages.base import Stage

class Broken(Stage):
    name = "broken"
    rank = 900
    parameters = ("broken",)
    rows = (parameter_row("broken", "int", 0, "Fails.", ge=0),)

    def prepare(self, params, info):
        if self.value(params, "broken") == 2:
            raise RuntimeError("prepare failed")

    def apply(self, logits, values, context):
        raise RuntimeError("apply failed")

STAGE = Broken()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the documented package, and packages that do not work."""
    source, target = tmp_path_factory.mktemp("flatten"), tmp_path_factory.mktemp("site")
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL))
    (source / "flatten.py").write_text(blocks["python"])
    (source / "pyproject.toml").write_text(blocks["toml"])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    (target / "broken.py").write_text(BROKEN)
    (target / "crashing.py").write_text("raise RuntimeError('at import')")
    info = target / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[aphrodite.samplers]\nbroken = broken:STAGE\ncrashing = crashing:STAGE\nno-stage = json:dumps\n"
    )
    return target


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(DOCS.parents[1])])}


class Server:
    """A running server and what it has printed so far."""

    def __init__(self, port: int, environ: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "aphrodite.cli", "run", "--port", str(port), "--kv-cache-memory", "256MiB"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, text=True
        )
        assert self._process.stdout is not None
        self.lines: list[str] = []
        for line in self._process.stdout:
            self.lines.append(line)
            if line.startswith("Ready after"):
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stdout or ()), daemon=True)
        self._reader.start()

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return dict(json.load(response))

    def post(self, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = json.dumps({**PROMPTS[path], "temperature": 0, "max_tokens": 4, **fields}).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> list[str]:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._reader.join(timeout=30)
        return self.lines


PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell me a story."}]},
}


@pytest.fixture(scope="module")
def server(site: Path, smollm2_path: Path) -> Iterator[Server]:
    """`aphrodite run` with the default model and what lies in `site`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = Server(port, environment(site))
    yield running
    running.stop()


@pytest.mark.parametrize("path", PROMPTS)
def test_its_parameter_is_a_field_of_every_endpoint(server: Server, path: str) -> None:
    status, plain = server.post(path, sampler_trace=True)
    assert status == 200
    status, mixed = server.post(path, sampler_trace=True, flatten=0.5)
    assert status == 200
    assert "warnings" not in mixed
    traces = zip(plain["choices"][0]["sampler_trace"], mixed["choices"][0]["sampler_trace"], strict=True)
    for without, trace in traces:  # greedy, and mixing in the uniform distribution keeps the order
        assert without["stages"] == []
        assert trace["token_id"] == without["token_id"]
        (stage,) = trace["stages"]
        assert stage["stage"] == "flatten"
        expected = 0.5 * without["model"]["probability"] + 0.5 / without["model"]["candidates"]
        assert stage["probability"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("path", PROMPTS)
def test_its_row_checks_and_its_place_can_be_chosen(server: Server, path: str) -> None:
    status, body = server.post(path, flatten=1.5)
    assert (status, body["error"]["param"]) == (400, "flatten")
    assert "at least 0 and at most 1" in body["error"]["message"]
    status, body = server.post(path, flaten=0.5)
    assert status == 200
    assert body["warnings"] == ["`flaten` is not a known field; it was ignored. Did you mean `flatten`?"]
    order = ["flatten", "min_p"]
    status, body = server.post(path, flatten=0.2, min_p=0.05, temperature=1, sampler_trace=True, sampler_priority=order)
    assert status == 200
    for trace in body["choices"][0]["sampler_trace"]:
        assert [stage["stage"] for stage in trace["stages"]] == order


def test_its_parameter_is_documented(server: Server) -> None:
    schema = server.get("/openapi.json")["components"]["schemas"]["ChatFields"]["properties"]
    assert schema["flatten"]["description"].startswith("Share of the uniform distribution.")


def test_one_that_fails_ends_only_requests_that_use_it(server: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        beside = pool.submit(server.post, "/v1/completions", max_tokens=40)
        apply = pool.submit(server.post, "/v1/completions", broken=1, max_tokens=40)
        prepare = pool.submit(server.post, "/v1/completions", broken=2, max_tokens=40)
        for failing in (apply, prepare):
            status, body = failing.result()
            assert (status, body["error"]["code"]) == (500, "request_failed")
        status, body = beside.result()
        assert status == 200
        assert body["usage"]["completion_tokens"] == 40


def test_the_log_says_what_was_left_out_and_what_failed(site: Path, server: Server) -> None:
    server.post("/v1/completions", broken=1)
    log = "".join(server.stop())
    assert re.search(r"crashing \(crashing:STAGE, package broken\) is left out: RuntimeError: at import", log)
    assert re.search(r"no-stage \(json:dumps, package broken\) is left out: ValueError: it is no instance", log)
    assert "the sampler extension broken failed" in log
    assert "or a sampler extension failed" in log


def test_it_is_a_flag_and_in_the_list(site: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "aphrodite.cli", "samplers"]
    listing = subprocess.run(
        [*command, "show", "flatten"], env=environment(site), capture_output=True, text=True, check=True
    ).stdout
    assert "Share of the uniform distribution." in listing
    assert "Mixes" in listing or "mixes" in listing
    usage = subprocess.run(
        [*command, "explain", "--help"], env=environment(site), capture_output=True, text=True, check=True
    ).stdout
    assert "--flatten" in usage


def test_the_api_process_needs_no_torch_for_it(site: Path) -> None:
    code = (
        "import sys; from aphrodite.sampling.fields import from_mapping, to_mapping;"
        "params = from_mapping({'flatten': 0.5}); assert to_mapping(params) == {'flatten': 0.5};"
        "assert params.extensions == {'flatten': 0.5}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(site), check=True)
