"""The engine in its own process: streams, aborts, backpressure, death and hanging, with the real model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.async_engine import AsyncEngine
from aphrodite.engine.output import merge_outputs
from aphrodite.errors import AphroditeError, EngineDeadError, InvalidRequestError, QueueFullError
from aphrodite.llm import LLM
from aphrodite.outputs import RequestOutput
from aphrodite.sampling.params import SamplingParams

PROMPT = "The lighthouse keeper opened the door and"
SEEDED = SamplingParams(max_tokens=24, temperature=0.9, min_p=0.02, seed=11, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True, seed=1)


def config(path: Path, **settings: object) -> EngineConfig:
    return EngineConfig(model=str(path), max_num_seqs=4, kv_cache_memory=256 << 20, **settings)  # type: ignore[arg-type]


@pytest.fixture
async def engine(smollm2_path: Path) -> AsyncIterator[AsyncEngine]:
    started = await AsyncEngine.start(config(smollm2_path, max_queued_requests=2))
    yield started
    await started.close()


async def collect(engine: AsyncEngine, params: SamplingParams, request_id: str = "r") -> list[RequestOutput]:
    ids = engine.tokenizer.encode(PROMPT, add_special_tokens=True)
    return [piece async for piece in engine.generate(ids, params, request_id=request_id)]


async def test_streams_join_to_the_offline_answer_whoever_runs_beside(engine: AsyncEngine, smollm2_path: Path) -> None:
    with LLM(smollm2_path, max_num_seqs=4, kv_cache_memory=256 << 20) as llm:
        offline = llm.generate(PROMPT, SEEDED, progress=False)[0].outputs[0]
    streams = await asyncio.gather(*(collect(engine, SEEDED, f"r{number}") for number in range(4)))
    for pieces in streams:
        answer = merge_outputs(pieces).outputs[0]
        assert answer.token_ids == offline.token_ids
        assert answer.text == offline.text
        assert answer.finish_reason == "length"
        assert len(pieces) > 1


async def test_closing_a_stream_frees_its_request(engine: AsyncEngine) -> None:
    ids = engine.tokenizer.encode(PROMPT, add_special_tokens=True)
    stream = engine.generate(ids, ENDLESS, request_id="endless")
    await anext(stream)
    await engine.check_health()
    assert engine.stats().num_running == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await engine.check_health()
    assert engine.stats().num_running == 0
    assert engine.stats().kv_usage == 0.0


async def test_a_full_queue_refuses_and_forgets(engine: AsyncEngine) -> None:
    ids = engine.tokenizer.encode(PROMPT, add_special_tokens=True)
    running = [engine.generate(ids, ENDLESS, request_id=str(number)) for number in range(6)]
    tasks = [asyncio.ensure_future(anext(stream)) for stream in running]
    await tasks[0]
    with pytest.raises(QueueFullError, match="try again"):
        await collect(engine, SEEDED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for stream in running:
        await stream.aclose()  # type: ignore[attr-defined]
    assert merge_outputs(await collect(engine, SEEDED)).finished


async def test_invalid_requests_are_refused_before_they_cross(engine: AsyncEngine) -> None:
    for ids, params in (
        ([], SEEDED),
        ([engine.model.vocab_size], SEEDED),
        ([1] * engine.model.max_model_len, SEEDED),
        ([1], SamplingParams(temperature=float("nan"))),
    ):
        with pytest.raises(InvalidRequestError):
            await anext(engine.generate(ids, params, request_id="bad"))
    await engine.check_health()
    assert engine.stats().num_steps == 0


async def test_a_killed_engine_fails_every_stream_and_new_request(engine: AsyncEngine) -> None:
    ids = engine.tokenizer.encode(PROMPT, add_special_tokens=True)
    stream = engine.generate(ids, ENDLESS, request_id="endless")
    await anext(stream)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="runs out of memory"):
        async for _ in stream:
            pass
    assert engine.dead.is_set()
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, SEEDED)


async def test_a_hanging_engine_is_not_healthy(engine: AsyncEngine) -> None:
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.check_health(), 0.3)
    os.kill(engine.pid, signal.SIGCONT)
    await asyncio.wait_for(engine.check_health(), 10)


async def test_a_checkpoint_that_cannot_load_is_one_clear_error(tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(AphroditeError, match="gguf"):
        await AsyncEngine.start(config(broken))


def test_the_engine_ends_with_its_parent_and_leaves_nothing(smollm2_path: Path, tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from aphrodite.config import EngineConfig\n"
        "from aphrodite.engine.async_engine import AsyncEngine\n"
        "async def main():\n"
        "    engine = await AsyncEngine.start(EngineConfig(model=sys.argv[1], kv_cache_memory=64 << 20))\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(smollm2_path)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert list(tmp_path.glob("aphrodite-*"))  # the folder of the socket
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
    assert not list(tmp_path.glob("aphrodite-*"))


async def test_the_engine_runs_the_package_of_its_parent(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout in the current folder does not shadow the installed package."""
    (tmp_path / "aphrodite").mkdir()
    (tmp_path / "aphrodite" / "__init__.py").write_text("raise SystemExit('the wrong package was imported')")
    monkeypatch.chdir(tmp_path)
    started = await AsyncEngine.start(config(smollm2_path))
    try:
        await started.check_health()
    finally:
        await started.close()
