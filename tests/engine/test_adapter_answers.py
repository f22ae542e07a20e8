"""Adapters in the whole engine: answers by name, beside each other, and adapters that come and go meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "runner"))
from adapter_cases import add_adapter, saved_adapter

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.loaded_adapters import LoadedAdapters
from aphrodite.engine.messages import AdapterInfo, AdapterNews, AddRequest
from aphrodite.errors import ConfigError, InvalidRequestError, ModelFormatError
from aphrodite.llm import LLM
from aphrodite.sampling.params import SamplingParams

NAMES = ("poet", "critic", "bard")
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
PROMPTS = [[3 + (7 * i + 13 * j) % 190 for j in range(length)] for i, length in enumerate((5, 33, 17, 40, 21, 9))]

MakeCore = Callable[..., EngineCore]


class Base:
    """A small Llama on disk, three adapters beside it, and PEFT's model of all."""

    def __init__(self, folder: Path) -> None:
        from torch_executor_cases import tiny_model

        model = tiny_model(
            transformers.LlamaForCausalLM, transformers.LlamaConfig, hidden_size=96, intermediate_size=128
        )
        self.path = folder / "base"
        model.save_pretrained(self.path)
        configs: list[dict[str, Any]] = [
            {"target_modules": ["q_proj", "v_proj"]},
            {"r": 16},
            {"use_rslora": True, "r": 2},
        ]
        for number, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
            model = add_adapter(model, name, number, **config)
        self.adapters = {name: saved_adapter(model, name, folder) for name in NAMES}
        self._model = model

    def greedy(self, name: str | None, prompt: list[int]) -> list[int]:
        """The 32 tokens that PEFT finds."""
        if name is not None:
            self._model.set_adapter(name)
        tokens = torch.tensor([prompt])
        options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            if name is not None:
                return self._model.generate(input_ids=tokens, **options)[0, len(prompt) :].tolist()
            with self._model.disable_adapter():
                return self._model.generate(input_ids=tokens, **options)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def make_core(base: Base) -> Iterator[MakeCore]:
    cores: list[EngineCore] = []

    def make(*names: str, **settings: object) -> EngineCore:
        sizes = {"max_num_seqs": 8, "kv_cache_memory": 8 << 20, "device": "cpu", "threads": 2}
        exact = {"activations": "float32", "kv_cache_dtype": "float32"}
        lora = tuple(f"{name}={base.adapters[name]}" for name in names)
        config = EngineConfig(model=str(base.path), lora=lora, **{**sizes, **exact, **settings})  # type: ignore[arg-type]
        cores.append(build_engine(config, ()).core)
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def add(core: EngineCore, name: str, prompt: list[int], adapter: int | None, params: SamplingParams = GREEDY) -> None:
    core.add(AddRequest([name], [1], prompt, params, 0, None, adapter=adapter))


def run(core: EngineCore, answers: dict[str, list[int]] | None = None, steps: int = 10_000) -> dict[str, list[int]]:
    """The answers once nothing is left to do, or after so many steps; a refused request has none."""
    answers = {} if answers is None else answers
    while core.has_work() and steps:
        steps -= 1
        for update in core.step():
            assert update.error is None or "was unloaded" in update.error, update.error
            answers.setdefault(update.request_id, []).extend(update.token_ids)
        core.scheduler.check()
    return answers


@pytest.mark.parametrize("settings", [{}, {"executor": "torch", "dtype": "float32"}, {"async_depth": 1}], ids=str)
def test_answers_of_one_batch_are_pefts(base: Base, make_core: MakeCore, settings: dict[str, Any]) -> None:
    core = make_core(*NAMES, **settings, max_num_batched_tokens=32)
    wanted = [0, None, 1, 2, 1, None]
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, wanted, strict=True)):
        add(core, str(number), prompt, adapter)
    answers = run(core)
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, wanted, strict=True)):
        assert answers[str(number)] == base.greedy(None if adapter is None else NAMES[adapter], prompt)


def test_more_adapters_than_slots_take_turns(base: Base, make_core: MakeCore) -> None:
    core = make_core(*NAMES, max_loras=1)
    for number, adapter in enumerate((0, 1, 2, 0, 1)):
        add(core, str(number), PROMPTS[1], adapter)
    answers = run(core)
    for number, adapter in enumerate((0, 1, 2, 0, 1)):
        assert answers[str(number)] == base.greedy(NAMES[adapter], PROMPTS[1])


def test_a_known_prefix_is_never_anothers(base: Base, make_core: MakeCore) -> None:
    core = make_core(*NAMES)
    for number, adapter in enumerate((None, 0, 1, 0, None)):
        add(core, str(number), PROMPTS[3], adapter)
        assert run(core)[str(number)] == base.greedy(None if adapter is None else NAMES[adapter], PROMPTS[3])
    assert core.stats().prefix_hits == 2 * 32


def test_adapters_come_and_go_while_others_answer(base: Base, make_core: MakeCore) -> None:
    core = make_core("poet")
    answers: dict[str, list[int]] = {}
    add(core, "first", PROMPTS[0], 0)
    add(core, "plain", PROMPTS[1], None)
    run(core, answers, steps=5)
    core.adapters.load(1, str(base.adapters["critic"]))
    core.adapters.unload(0)
    news: list[AdapterNews] = []
    while len(news) < 1:
        run(core, answers, steps=1)
        news += core.adapters.take_news()
    assert (news[0].number, news[0].error) == (1, None)
    assert (news[0].adapter.rank, news[0].adapter.modules) == (16, 21)
    add(core, "second", PROMPTS[2], 1)
    add(core, "late", PROMPTS[2], 0)
    while len(news) < 2:
        run(core, answers, steps=1)
        news += core.adapters.take_news()
    assert len(answers["first"]) == 32  # its adapter stayed until it had ended
    assert (news[1].number, news[1].adapter, news[1].error) == (0, None, None)
    run(core, answers)
    assert answers["late"] == []
    for request, name, prompt in (("first", "poet", 0), ("plain", None, 1), ("second", "critic", 2)):
        assert answers[request] == base.greedy(name, PROMPTS[prompt])


def test_an_unloaded_adapter_is_gone_without_a_further_answer(base: Base, smollm2_path: Path) -> None:
    settings = {"device": "cpu", "threads": 1, "activations": "float32", "kv_cache_dtype": "float32"}
    with LLM(
        base.path, tokenizer=str(smollm2_path), enable_lora=True, max_num_seqs=4, kv_cache_memory=8 << 20, **settings
    ) as llm:
        llm.load_adapter("poet", base.adapters["poet"])
        (answer,) = llm.generate([PROMPTS[0]], GREEDY, adapter="poet", progress=False)
        assert answer.outputs[0].token_ids == base.greedy("poet", PROMPTS[0])
        llm.unload_adapter("poet")
        assert not llm._core.adapters.busy
        with pytest.raises(InvalidRequestError, match="loaded: none"):
            llm.generate([PROMPTS[0]], GREEDY, adapter="poet", progress=False)


def test_guidance_is_by_the_adapter_too(make_core: MakeCore) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, guidance_scale=1.5, negative_prompt_ids=(9, 8, 7))
    core = make_core("poet", "critic")
    for number in (0, 1):
        add(core, str(number), PROMPTS[0], number, params)
    together = run(core)
    assert together["0"] != together["1"]
    for number in (0, 1):
        add(core, f"alone {number}", PROMPTS[0], number, params)
        assert run(core)[f"alone {number}"] == together[str(number)]


def test_a_file_that_does_not_fit_is_told_and_harms_nobody(tmp_path: Path, base: Base, make_core: MakeCore) -> None:
    core = make_core(enable_lora=True, max_lora_rank=8)
    for number, path in enumerate((tmp_path / "nowhere", base.adapters["critic"])):
        core.adapters.load(number, str(path))
    news: dict[int, str | None] = {}
    while len(news) < 2:
        run(core, steps=1)
        news.update((one.number, one.error) for one in core.adapters.take_news())
    assert "there is no adapter" in (news[0] or "")
    assert "its rank is 16 and the largest with room here is 8" in (news[1] or "")
    add(core, "fine", PROMPTS[0], None)
    assert run(core)["fine"] == base.greedy(None, PROMPTS[0])


def test_an_engine_without_room_says_how_to_make_it(base: Base, make_core: MakeCore) -> None:
    core = make_core()
    with pytest.raises(ConfigError, match="--enable-lora"):
        core.adapters.load_now(0, str(base.adapters["poet"]))


@pytest.mark.parametrize(
    ("lora", "words", "error"),
    [
        (("poet",), "write NAME=PATH", ConfigError),
        (("poet=",), "write NAME=PATH", ConfigError),
        (("poet=/x", "poet=/y"), "given twice", ConfigError),
        (("poet=/nowhere",), "there is no adapter at /nowhere", ModelFormatError),
    ],
)
def test_wrong_settings_are_refused(base: Base, lora: tuple[str, ...], words: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=words):
        build_engine(EngineConfig(model=str(base.path), lora=lora, device="cpu"), ())


def test_names_come_with_the_engines_word_and_go_at_once() -> None:
    adapters = LoadedAdapters(("poet=/models/poet",), [AdapterInfo(8, 21, 100)])
    assert [(one.name, one.number, one.root) for one in adapters] == [("poet", 0, "poet")]
    number = adapters.begin("critic", "/models/critic-v2")
    assert "critic" not in adapters
    with pytest.raises(InvalidRequestError, match="already"):
        adapters.begin("critic", "/elsewhere")
    assert adapters.arrived(AdapterNews(number, adapter=AdapterInfo(4, 2, 10))).root == "critic-v2"
    assert adapters.number("critic") == number == 1
    assert adapters.leave("poet") == 0
    with pytest.raises(InvalidRequestError, match="loaded: critic"):
        adapters.number("poet")
    again = adapters.begin("poet", "/models/poet")
    with pytest.raises(ConfigError, match="broken"):
        adapters.arrived(AdapterNews(again, error="broken"))
    assert "poet" not in adapters
    assert adapters.begin("poet", "/models/poet") == 3
