"""`LLM.chat` with a checkpoint that brings no template, and with one that was asked for."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from aphrodite.errors import ConfigError, EngineDeadError, InvalidRequestError
from aphrodite.llm import LLM
from aphrodite.sampling.params import SamplingParams

SETTINGS: dict[str, Any] = {"load_format": "dummy", "threads": 1, "max_num_seqs": 2, "kv_cache_memory": 1 << 20}
CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def bare_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer knows ChatML's tokens, without a template and without an end of sequence."""
    folder = tmp_path_factory.mktemp("bare") / "Some-Tune"
    shutil.copytree(tiny_model, folder)
    characters = sorted({chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"})
    backend = tokenizers.Tokenizer(models.BPE({text: number for number, text in enumerate(characters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CHATML)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_a_template_is_recognised_and_its_end_of_turn_ends_answers(
    bare_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "aphrodite"), LLM(bare_model, **SETTINGS) as llm:
        assert "the checkpoint has no chat template: chatml is used" in caplog.text
        end = llm.tokenizer.token_to_id("<|im_end|>")
        assert end is not None
        forced = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={end: 100.0})
        messages = [{"role": "user", "name": "Ann", "content": "Hi"}]
        output = llm.chat(messages, forced, progress=False)[0]
        prompt = llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        assert prompt == "<|im_start|>user\nAnn: Hi<|im_end|>\n<|im_start|>assistant\n"
        assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("stop", 1)
        assert list(llm.stream(messages, forced))[-1].outputs[0].finish_reason == "stop"
        with pytest.raises(InvalidRequestError, match="continue_final_message: only a conversation takes"):
            list(llm.stream("Hi", forced, continue_final_message=True))
        assert llm.generate([output.prompt_token_ids], forced, progress=False)[0].outputs[0].finish_reason == "length"


def test_a_wrong_name_costs_no_loading(bare_model: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean chatml"):
        LLM(bare_model, chat_template="chatmll", **SETTINGS)


def test_a_named_template_takes_the_place_of_the_models(bare_model: Path) -> None:
    with LLM(bare_model, chat_template="Vicuna", **SETTINGS) as llm:
        ids = llm.encode_chat(
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ],
            continue_final_message=True,
        )
        assert llm.tokenizer.decode(ids) == "S USER: a ASSISTANT: b"


def test_a_budget_of_reasoning_in_chats_and_in_text(bare_model: Path) -> None:
    params = SamplingParams(thinking_token_budget=3, max_tokens=15, seed=1, ignore_eos=True)
    messages = [{"role": "user", "content": "Hi"}]
    with LLM(bare_model, chat_template="deepseek-r1", **SETTINGS) as llm:  # its prompts end with <think>
        closing = llm.tokenizer.encode("</think>", add_special_tokens=False)
        outputs = llm.chat(messages, params, progress=False)
        outputs += llm.generate(["a<think>b", "a<think>b</think>", "a"], params, progress=False)
        streamed = "".join(piece.outputs[0].text for piece in llm.stream(messages, params))
    answers = [output.outputs[0] for output in outputs]
    assert [answer.token_ids[3 : 3 + len(closing)] == closing for answer in answers] == [True, True, False, False]
    assert streamed == answers[0].text


def test_answers_that_are_streamed_side_by_side_are_whole(bare_model: Path) -> None:
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    with LLM(bare_model, **SETTINGS) as llm:
        expected = [output.outputs[0].text for output in llm.generate(["one", "two"], params, progress=False)]
        found = ["", ""]
        for pieces in itertools.zip_longest(llm.stream("one", params), llm.stream("two", params)):
            for number, piece in enumerate(pieces):
                found[number] += piece.outputs[0].text if piece else ""
        assert found == expected
        first = llm.stream("one", params)
        text = next(first).outputs[0].text
        assert llm.generate("two", params, progress=False)[0].outputs[0].text == expected[1]
        assert text + "".join(piece.outputs[0].text for piece in first) == expected[0]


def test_a_closed_llm_says_so(bare_model: Path) -> None:
    llm = LLM(bare_model, **SETTINGS)
    stream = llm.stream("one", SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    llm.close()
    for ask in (lambda: next(stream), lambda: llm.generate("two", progress=False)):
        with pytest.raises(EngineDeadError, match="this LLM was closed"):
            ask()
