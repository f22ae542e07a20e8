"""Several models: loaded when they are asked for, unloaded when nobody uses them or others need their room."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fake_engine import FakeEngine
from fake_loader import GIB, Clock, FakeLoader, offered, pool_of

from aphrodite.errors import EngineDeadError, ModelFormatError
from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import ApiError
from aphrodite.server.model_pool import FAILURE_SECONDS, ModelPool
from aphrodite.server.served_model import LoadedModel


async def settled() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def loaded_names(pool: ModelPool) -> list[str]:
    return [model.name for model in pool.models if model.state == "loaded"]


async def once(pool: ModelPool, name: str) -> None:
    (await pool.use(pool.find(name))).end_use()


async def test_two_requests_for_a_model_that_loads_share_one_load() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"))
    loader.gate.clear()
    model = pool.find("a")
    uses = [asyncio.ensure_future(pool.use(model)) for _ in range(5)]
    await settled()
    assert model.state == "loading"
    assert model.progress.latest == ("loading weights", 1, 2)
    loader.gate.set()
    engines = [loaded.engine for loaded in await asyncio.gather(*uses)]
    assert all(engine is loader.engines["a"] for engine in engines)
    assert loader.started == ["a"]
    assert model.facts is not None
    assert model.facts.root == "a"


async def test_the_least_recently_used_of_the_idle_ones_gives_way() -> None:
    clock, loader = Clock(), FakeLoader(budget=3 * GIB)
    pool = pool_of(loader, *(offered(name) for name in "abcd"), clock=clock)
    for name in "abca":
        await once(pool, name)
        clock.now += 1
    assert loaded_names(pool) == ["a", "b", "c"]
    await once(pool, "d")
    assert loaded_names(pool) == ["a", "c", "d"]
    assert loader.engines["b"].dead.is_set()
    holding = await pool.use(pool.find("a"))  # the oldest now, but in use
    clock.now += 1
    await once(pool, "c")
    await once(pool, "b")
    assert loaded_names(pool) == ["a", "b", "c"]
    holding.end_use()


async def test_several_small_ones_give_way_to_a_large_one() -> None:
    loader = FakeLoader(budget=4 * GIB, sizes={"large": 3 * GIB})
    pool = pool_of(loader, *(offered(name) for name in ("a", "b", "c", "large")))
    for name in ("a", "b", "c", "large"):
        await once(pool, name)
    assert len(loaded_names(pool)) == 2
    assert "large" in loaded_names(pool)


async def test_one_at_a_time() -> None:
    pool = pool_of(FakeLoader(), offered("a"), offered("b"), max_loaded=1)
    for name in "abab":
        await once(pool, name)
        assert loaded_names(pool) == [name]


async def test_who_gives_way_answers_what_it_has_and_newcomers_wait_their_turn() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"), max_loaded=1)
    running = await pool.use(pool.find("a"))
    wants_b = asyncio.ensure_future(pool.use(pool.find("b")))
    await settled()
    assert pool.find("a").state == "unloading"
    wants_a = asyncio.ensure_future(pool.use(pool.find("a")))  # must not keep b from ever coming
    await settled()
    assert loader.started == ["a"]
    assert not running.engine.dead.is_set()
    running.end_use()
    b = await wants_b
    assert running.engine.dead.is_set()
    await settled()
    assert not wants_a.done()
    b.end_use()
    a = await wants_a
    assert loader.started == ["a", "b", "a"]
    assert loaded_names(pool) == ["a"]
    a.end_use()


async def test_who_is_done_first_gives_way() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"), offered("c"), max_loaded=2)
    long, short = await pool.use(pool.find("a")), await pool.use(pool.find("b"))
    wants_c = asyncio.ensure_future(pool.use(pool.find("c")))
    await settled()
    assert pool.find("a").state == "unloading"  # the one that was used least recently
    short.end_use()
    await wants_c
    assert loaded_names(pool) == ["a", "c"]
    assert not long.engine.dead.is_set()
    assert (await pool.use(pool.find("a"))).engine is long.engine


async def test_a_wish_that_was_given_up_costs_nobody_their_model() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"), max_loaded=1)
    running = await pool.use(pool.find("a"))
    wish = asyncio.ensure_future(pool.use(pool.find("b")))
    await settled()
    also_a = asyncio.ensure_future(pool.use(pool.find("a")))
    await settled()
    wish.cancel()
    await asyncio.wait((wish,))
    assert (await also_a).engine is running.engine
    assert loader.started == ["a"]


async def test_who_leaves_at_the_moment_of_success_uses_nothing() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"))
    use = asyncio.ensure_future(pool.use(pool.find("a")))
    while pool.find("a").loaded is None:
        await asyncio.sleep(0)
    use.cancel()
    await asyncio.wait((use,))
    loaded = pool.find("a").loaded
    assert loaded is not None
    assert loaded.idle.is_set()


async def test_a_model_that_cannot_fit_is_refused_with_numbers_and_nobody_leaves_for_it() -> None:
    loader = FakeLoader(budget=4 * GIB, sizes={"huge": 5 * GIB, "large": 4 * GIB})
    pool = pool_of(loader, offered("pin", pinned=True), offered("a"), offered("huge"), offered("large"))
    await once(pool, "pin")
    await once(pool, "a")
    for name, numbers in (("huge", ("5.00 GiB", "4.00 GiB")), ("large", ("4.00 GiB", "1.00 GiB are taken"))):
        with pytest.raises(ApiError) as refusal:
            await once(pool, name)
        assert (refusal.value.status, refusal.value.code) == (503, "insufficient_memory")
        assert all(number in refusal.value.message for number in numbers)
    assert loaded_names(pool) == ["pin", "a"]


async def test_pinned_models_never_give_way() -> None:
    pool = pool_of(FakeLoader(budget=2 * GIB), offered("pin", pinned=True), offered("a"), offered("b"))
    for name in ("pin", "a", "b", "a"):
        await once(pool, name)
        assert "pin" in loaded_names(pool)


async def test_a_load_that_fails_fails_its_requests_only_and_is_not_repeated_at_once() -> None:
    clock, loader = Clock(), FakeLoader()
    loader.fails["/models/secret/b.gguf"] = ModelFormatError("/models/secret/b.gguf: the header of b.gguf is damaged")
    pool = pool_of(loader, offered("a"), offered("/models/secret/b.gguf", "b"), clock=clock)
    using = await pool.use(pool.find("a"))
    outcomes = await asyncio.gather(*(pool.use(pool.find("b")) for _ in range(3)), return_exceptions=True)
    assert {(error.status, error.code) for error in outcomes if isinstance(error, ApiError)} == {
        (500, "model_load_failed")
    }
    assert "b.gguf is damaged" in str(outcomes[0])
    assert "/models/secret/b.gguf: " not in str(outcomes[0]).partition("cannot be loaded")[2]
    with pytest.raises(ApiError):
        await once(pool, "b")
    assert loader.started == ["a", "/models/secret/b.gguf"]
    assert not using.engine.dead.is_set()
    with pytest.raises(ApiError):
        await pool.load(pool.find("b"))  # which somebody asked for on purpose
    assert loader.started.count("/models/secret/b.gguf") == 2
    clock.now += FAILURE_SECONDS + 1
    del loader.fails["/models/secret/b.gguf"]
    await once(pool, "b")
    assert len(loaded_names(pool)) == 2


async def test_an_engine_that_dies_is_started_again_by_the_next_request() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"))
    using = await pool.use(pool.find("a"))
    await once(pool, "b")
    loader.engines["a"].dead.set()
    await settled()
    assert loaded_names(pool) == ["b"]
    assert not pool.dead.is_set()
    again = await pool.use(pool.find("a"))
    assert again is not using
    using.end_use()  # the one before, whose end changes nothing for the new one
    assert not again.idle.is_set()


async def test_keep_alive_counts_from_the_last_request_on() -> None:
    clock = Clock()
    pool = pool_of(FakeLoader(), offered("a", keep_alive=60.0), offered("pin", pinned=True, keep_alive=1.0),
                   clock=clock)  # fmt: skip
    await once(pool, "pin")
    using = await pool.use(pool.find("a"))
    clock.now += 1000
    await pool.expire()
    assert loaded_names(pool) == ["a", "pin"]
    using.end_use()
    clock.now += 59
    await pool.expire()
    assert loaded_names(pool) == ["a", "pin"]
    clock.now += 1
    await pool.expire()
    assert loaded_names(pool) == ["pin"]


async def test_a_request_may_say_how_long_its_model_stays() -> None:
    clock = Clock()
    pool = pool_of(FakeLoader(), offered("a"), clock=clock)
    model = pool.find("a")
    using = await pool.use(model)
    pool.set_keep_alive(model, 5.0)
    using.end_use()
    clock.now += 5
    await pool.expire()
    assert loaded_names(pool) == []
    using = await pool.use(model)
    pool.set_keep_alive(model, 5.0)
    using.end_use()
    await once(pool, "a")  # which says nothing, so that the model's own setting holds again
    clock.now += 10**6
    await pool.expire()
    assert loaded_names(pool) == ["a"]


async def test_time_is_watched_without_anybody_asking() -> None:
    pool = ModelPool(ServerConfig(), FakeLoader())
    model = pool.offer(offered("a", keep_alive=0.0))
    pool.start()
    loaded = await pool.use(model)
    loaded.end_use()
    await asyncio.wait_for(loaded.engine.dead.wait(), 20)
    assert model.loaded is None
    await pool.close()


async def test_unloading_waits_for_what_runs_and_those_who_come_load_again() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"))
    model = pool.find("a")
    using = await pool.use(model)
    unloading = asyncio.ensure_future(pool.unload(model))
    await settled()
    late = asyncio.ensure_future(pool.use(model))
    await settled()
    assert not unloading.done()
    using.end_use()
    await unloading
    assert (await late).engine is not using.engine
    assert loader.started == ["a", "a"]


async def test_whoever_waits_for_a_model_that_is_removed_is_told() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("ORG/A"), offered("b"))
    model = pool.find("ORG/A")
    using = await pool.use(model)
    removing = asyncio.ensure_future(pool.delete(model))
    await settled()
    late = asyncio.ensure_future(pool.use(model))
    await settled()
    using.end_use()
    await removing
    with pytest.raises(ApiError) as refusal:
        await late
    assert refusal.value.status == 404
    assert loader.started == ["ORG/A"]
    assert loader.engines["ORG/A"].dead.is_set()
    assert pool.names == ["b"]


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_comes_the_budget_holds_and_nobody_is_forgotten(seed: int) -> None:
    """Clients that use, leave early, unload and let time pass, and engines that die, in any order."""
    rng, clock = random.Random(seed), Clock()
    names = [f"model-{number}" for number in range(6)]
    sizes = {name: rng.randint(1, 4) * GIB for name in names}
    loader = FakeLoader(budget=6 * GIB, sizes=sizes)
    models = [offered(name, keep_alive=rng.choice([None, 5.0]), pinned=name == "model-0") for name in names]
    sizes["model-0"] = GIB
    pool = pool_of(loader, *models, clock=clock, max_loaded=rng.choice([None, 2, 3]))
    answered = 0
    killed: dict[int, FakeEngine] = {}

    async def client() -> None:
        nonlocal answered
        for _ in range(15):
            use = asyncio.ensure_future(pool.use(pool.find(rng.choice(names))))
            for _ in range(rng.randint(0, 6)):
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                use.cancel()
            try:
                loaded = await use
            except asyncio.CancelledError:
                continue
            for _ in range(rng.randint(0, 4)):
                await asyncio.sleep(0)
                assert not loaded.engine.dead.is_set() or id(loaded.engine) in killed
            loaded.end_use()
            answered += 1

    async def trouble() -> None:
        for _ in range(40):
            for _ in range(5):
                await asyncio.sleep(0)
            clock.now += rng.random() * 4
            await rng.choice([pool.expire, lambda: pool.unload(pool.find(rng.choice(names))), kill])()

    async def kill() -> None:
        running = [model.loaded.engine for model in pool.models if model.loaded is not None]
        if running:
            victim = rng.choice(running)
            killed[id(victim)] = victim
            victim.dead.set()

    async with asyncio.timeout(20):
        await asyncio.gather(*(client() for _ in range(10)), trouble())
    assert answered > 80
    assert not any(model.waiters or model.leaving or model.loading for model in pool.models)
    assert all(model.loaded is None or model.loaded.idle.is_set() for model in pool.models)
    running = {path for path, engine in loader.engines.items() if not engine.dead.is_set()}
    assert running == set(loaded_names(pool))
    assert sum(sizes[name] for name in loaded_names(pool)) <= 6 * GIB
    await pool.close()


async def test_too_many_who_wait_are_told_to_come_back() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), max_waiting=2)
    loader.gate.clear()
    waiting = [asyncio.ensure_future(pool.use(pool.find("a"))) for _ in range(2)]
    await settled()
    with pytest.raises(ApiError) as refusal:
        await pool.use(pool.find("a"))
    assert (refusal.value.status, refusal.value.code) == (503, "models_busy")
    assert dict(refusal.value.headers)[b"retry-after"]
    loader.gate.set()
    await asyncio.gather(*waiting)


async def test_closing_ends_every_engine_and_whoever_loads() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"))
    await once(pool, "a")
    loader.gate.clear()
    waiting = asyncio.ensure_future(pool.use(pool.find("b")))
    await settled()
    await pool.close()
    assert loader.engines["a"].dead.is_set()
    waiting.cancel()


async def test_without_a_name_the_model_used_last_is_meant() -> None:
    clock = Clock()
    pool = pool_of(FakeLoader(), offered("a"), offered("b"), clock=clock)
    assert pool.find(None).name == "a"
    await once(pool, "b")
    assert pool.find(None).name == "b"
    clock.now += 1
    await once(pool, "a")
    assert pool.find(None).name == "a"
    await pool.unload(pool.find("a"))
    assert pool.find(None).name == "b"


async def test_a_server_without_models_says_so() -> None:
    pool = pool_of(FakeLoader())
    for name in (None, "a"):
        with pytest.raises(ApiError, match="none yet"):
            pool.find(name)


async def test_a_folder_that_gains_a_model_is_looked_at_when_a_name_is_unknown() -> None:
    clock: Any = Clock()
    folder = [offered("a")]
    pool = ModelPool(ServerConfig(), FakeLoader(), discover=lambda: folder, clock=clock)
    pool.offer(folder[0])
    folder.append(offered("b", "a", "bee"))
    assert pool.find("bee").names == ("b", "bee")  # a name that is taken stays with its owner
    clock.now += 60
    with pytest.raises(ApiError, match="This server has: a, b, bee"):
        pool.find("c")


async def test_the_one_engine_of_a_server_is_neither_loaded_nor_unloaded() -> None:
    engine = FakeEngine()
    pool = ModelPool.of_engine(engine, ServerConfig())
    model = pool.find(None)
    assert isinstance(model.loaded, LoadedModel)
    pool.set_keep_alive(model, 0.0)
    await once(pool, "fake/story")
    assert model.loaded.expires is None
    with pytest.raises(ApiError, match="--models-dir"):
        await pool.unload(model)
    engine.dead.set()
    with pytest.raises(EngineDeadError):
        await pool.use(model)


async def test_an_engine_ends_whole_though_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("a"), offered("b"), max_loaded=1)
    await once(pool, "a")
    engine, may_end = loader.engines["a"], asyncio.Event()

    async def close() -> None:
        await may_end.wait()
        engine.dead.set()

    monkeypatch.setattr(engine, "close", close)
    unloading = asyncio.ensure_future(pool.unload(pool.find("a")))
    await settled()
    unloading.cancel()
    late = asyncio.ensure_future(once(pool, "b"))
    await settled()
    assert loader.started == ["a"]  # its memory is not free yet
    may_end.set()
    await asyncio.wait((unloading,))
    assert unloading.cancelled()
    assert engine.dead.is_set()
    await late
    assert loaded_names(pool) == ["b"]


async def test_a_removal_that_was_given_up_loses_no_engine() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("ORG/A"), offered("b"))
    model = pool.find("ORG/A")
    using = await pool.use(model)
    removing = asyncio.ensure_future(pool.delete(model))
    await settled()
    removing.cancel()
    await asyncio.wait((removing,))
    using.end_use()
    assert (await pool.use(pool.find("ORG/A"))).engine is using.engine
    assert loader.deleted == []
    await pool.close()
    assert loader.engines["ORG/A"].dead.is_set()


async def test_a_model_is_removed_once() -> None:
    loader = FakeLoader()
    pool = pool_of(loader, offered("ORG/A"), offered("b"))
    model = pool.find("ORG/A")
    outcomes = await asyncio.gather(pool.delete(model), pool.delete(model), return_exceptions=True)
    assert [getattr(outcome, "status", None) for outcome in outcomes] == [None, 404]
    assert loader.deleted == ["ORG/A"]


async def test_a_failure_holds_nothing_of_the_requests_that_it_was_told() -> None:
    loader = FakeLoader(fails={"a": ModelFormatError("damaged")})
    pool = pool_of(loader, offered("a"))
    depths = set()
    for _ in range(4):
        with pytest.raises(ApiError) as refusal:
            await once(pool, "a")
        depths.add(len(refusal.traceback))
    assert loader.started == ["a"]
    assert len(depths) <= 2  # the first waited, the others were told at once
