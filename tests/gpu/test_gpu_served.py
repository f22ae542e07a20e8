"""What surrounds the engine on a GPU: its own process, the HTTP server, and what `doctor` says of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aphrodite.config import EngineConfig
from aphrodite.engine.async_engine import AsyncEngine
from aphrodite.llm import LLM
from aphrodite.sampling.params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
# Dummy weights are the same in every process on one kind of device.
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "load_format": "dummy",
    "kv_cache_memory": 1 << 28,
    "max_num_seqs": 8,
    "max_model_len": 512,
}
PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(length)] for i, length in enumerate((4, 17, 40, 120))]
START_SECONDS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"w{number}" for number in range(400 - 256))]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Greedy answers of the engine in this process."""
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    with LLM(model, **SETTINGS) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
    torch.cuda.empty_cache()
    return [output.outputs[0].token_ids for output in outputs]


def test_engine_process_streams_the_same_tokens(model: Path, expected: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)

    async def tokens(engine: AsyncEngine, number: int) -> list[int]:
        stream = engine.generate(PROMPTS[number], params, request_id=str(number))
        return [token async for piece in stream for token in piece.outputs[0].token_ids]

    async def serve() -> list[list[int]]:
        engine = await AsyncEngine.start(EngineConfig(model=str(model), **SETTINGS))
        try:
            return await asyncio.gather(*(tokens(engine, number) for number in range(len(PROMPTS))))
        finally:
            await engine.close()

    assert asyncio.run(serve()) == expected


@pytest.fixture
def server(model: Path) -> Iterator[str]:
    """`aphrodite run` on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "aphrodite.cli", "run", str(model), f"--port={port}", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _wait_for(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            raise RuntimeError(f"the server ended: {process.communicate()[1]}")
        try:
            with urllib.request.urlopen(address, timeout=START_SECONDS) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass  # it does not listen yet, or says that it is loading
    raise TimeoutError(f"no server within {START_SECONDS} s")


def test_server_answers_with_the_same_tokens(server: str, expected: list[list[int]], model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def text(prompt: list[int]) -> str:
        body = {"model": model.name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        texts = list(clients.map(text, PROMPTS))
    assert texts == [tokenizer.decode(tokens) for tokens in expected]


def test_doctor_names_the_gpu() -> None:
    command = [sys.executable, "-m", "aphrodite.cli", "doctor", "--json", "--no-load"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert torch.cuda.get_device_name() in report["Devices"]["cuda:0"]
