"""The library against the templates that models' authors publish.

`published_renderings.json` holds what transformers' `apply_chat_template` makes of the conversations in it with the
template of the named model (of the repository's tokenizer_config.json, as of 2026). Dates are masked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from aphrodite.chat.jinja import JinjaTemplate
from aphrodite.chat.table import template_names

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("published_renderings.json").read_text("utf-8"))
WITH_TOOLS = ("tools", "called")


@pytest.mark.parametrize("name", RECORDED["templates"])
def test_the_librarys_template_renders_what_the_published_one_does(name: str) -> None:
    recorded = RECORDED["templates"][name]
    template = JinjaTemplate(template_names()[name].source, bos_token=recorded["bos"], eos_token=recorded["eos"])
    assert recorded["cases"]
    for case in recorded["cases"]:
        conversation = case["conversation"]
        text = template.render(
            RECORDED["conversations"][conversation],
            tools=RECORDED["tools"] if conversation in WITH_TOOLS else None,
            add_generation_prompt=case["opens"],
        )
        assert re.sub(r"Current date: \d{4}-\d\d-\d\d", "Current date: DATE", text) == case["text"], case


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
# From the documentation of models that publish no template, or another one by now.
DOCUMENTED = {
    # Mistral's guide to its tokenizers, version 1, without what SentencePiece puts before words.
    "mistral-v1": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "mixtral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    # The model card of Yi-34B-Chat; it has no bos.
    "yi": "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    # The model card of Phi-4-mini-instruct.
    "phi-4-mini": "<s><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|>"
    "<|user|>Bye<|end|><|assistant|>",
    # The model card of stablelm-zephyr-3b.
    "stablelm": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    "<|user|>\nBye</s>\n<|assistant|>\n",
    # Llama 4's prompt format, on Meta's site.
    "llama-4": "<s><|header_start|>system<|header_end|>\n\nBe kind.<|eot|>"
    "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nHello<|eot|><|header_start|>user<|header_end|>\n\nBye<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n",
    "falcon-3": "<s><|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\n",
    "plain": "<s>Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_formats_without_a_published_template(name: str) -> None:
    template = JinjaTemplate(template_names()[name].source, bos_token="<s>", eos_token="</s>")
    assert template.render(CHAT) == DOCUMENTED[name]


def test_koala_has_no_system_role() -> None:
    template = JinjaTemplate(template_names()["koala"].source, bos_token="<s>", eos_token="</s>")
    expected = "<s>BEGINNING OF CONVERSATION: USER: Hi GPT: Hello</s>USER: Bye GPT:"  # as the model card has it
    assert template.render(CHAT[1:]) == expected


def test_every_format_is_compared_with_something() -> None:
    compared = {template_names()[name].file for name in (*RECORDED["templates"], *DOCUMENTED, "koala")}
    assert compared == {row.file for row in template_names().values()}
    files = {file.stem for file in Path(__file__).parents[2].glob("aphrodite/chat/templates/*.jinja")}
    assert files == compared
