"""Earlier calls of tools in conversations: what is said beside them, several in one turn, ids, what follows results."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from aphrodite.chat.table import TEMPLATES
from aphrodite.chat.template import ChatTemplate
from aphrodite.chat.tools.history import one_call_a_turn

TOOLS = [{"type": "function", "function": {"name": name, "description": "", "parameters": {}}} for name in ("f", "g")]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}


def assistant(text: str | None, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def result(text: str, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def library(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name].source, bos_token="<s>", eos_token="</s>")


def in_order(text: str, *parts: str) -> bool:
    position = 0
    for part in parts:
        position = text.find(part, position) + 1
        if not position:
            return False
    return True


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("with_tools", [True, False])
def test_no_format_of_the_library_loses_a_text(name: str, with_tools: bool) -> None:
    talk = [
        {"role": "system", "content": "Rule0"},
        user("Ask1"),
        assistant("Said2", call("f", "call_one"), call("g", "call_two")),
        result("Got3", "call_one"),
        result("Got4", "call_two"),
        user("Ask5"),
        assistant(None, call("g", "call_three")),
        result("Got6", "call_three"),
        assistant("Said7"),
        user("Ask8"),
    ]
    text = library(name).render(talk, tools=TOOLS if with_tools else None)
    assert in_order(text, "Ask1", "Said2", "Got3", "Got4", "Ask5", "Got6", "Said7", "Ask8")
    assert "Rule0" in text
    assert "None" not in text.replace("None where", "")


SEEN = {
    "mistral-v3": ' Look:[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>[TOOL_RESULTS] ',
    "mistral-v3-tekken": '[/INST]Look:[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>[TOOL_R',
    "mistral-v7": ' Look:[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>[TOOL_RESULTS] abc',
    "mistral-v7-tekken": '[/INST]Look:[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>[TOOL_R',
    # A message for the user, as harmony's description has it before calls.
    "gpt-oss": "<|start|>assistant<|channel|>commentary<|message|>Look:<|end|><|start|>assistant to=functions.f",
    # Meta's format has no text in a message that calls.
    "llama-3.1": "<|end_header_id|>\n\nLook:<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "f", "parameters": {"a": 1}}<|eot_id|>',
    "glm-4.5": "<think></think>\nLook:\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "kimi-k2": "<|im_middle|>Look:<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    "<|im_system|>tool<|im_middle|>## Return of functions.f:0\nx<|im_end|><|im_assistant|>",
    # As the model card of DeepSeek V3.1 has it.
    "deepseek-v3.1": "<｜Assistant｜></think>Look:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
    '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁output▁begin｜>x<｜tool▁output▁end｜>',
    "phi-4-mini": '<|assistant|>Look:\n<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|><|end|>',
}


@pytest.mark.parametrize("name", SEEN)
def test_words_stand_before_calls_as_the_model_writes_them(name: str) -> None:
    talk = [user("a"), assistant("Look:", call("f")), result("x")]
    assert SEEN[name] in library(name).render(talk, tools=TOOLS)


def test_harmony_shows_what_was_thought_and_what_was_said() -> None:
    said = {**assistant("Look:", call("f")), "reasoning_content": "Hm."}
    text = library("gpt-oss").render([user("a"), said, result("x")], tools=TOOLS)
    assert "analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Look:<|end|>" in text


SHOWN = "{% for c in m.tool_calls or [] %}({{ c.function.name }}{{ c.id }}){% endfor %}"
LOOP = "{% for m in messages %}<{{ m.role }}>{{ WORDS }}" + SHOWN + "{{ m.tool_call_id }}{% endfor %}"


def test_words_that_a_template_leaves_out_beside_calls_get_a_turn_of_their_own() -> None:
    template = ChatTemplate(LOOP.replace("WORDS", "m.content if not m.tool_calls"))
    text = template.render([user("a"), assistant("Look:", call("f", "1")), result("x", "1")])
    assert text == "<user>a<assistant>Look:<assistant>(f1)<tool>x1"


def test_words_that_a_template_has_no_place_for_are_left_out_with_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alternating = (
        "{% set turns = messages | rejectattr('role', 'equalto', 'tool') | rejectattr('tool_calls') | list %}"
        "{% for m in turns %}{{ raise_exception('alternate') if (m.role == 'user') != (loop.index0 % 2 == 0) }}"
        "{% endfor %}"
    )
    template = ChatTemplate(alternating + LOOP.replace("WORDS", "m.content if not m.tool_calls"), name="the test's")
    talk = [user("a"), assistant("Look:", call("f", "1")), result("x", "1"), assistant("b")]
    with caplog.at_level(logging.INFO, "aphrodite"):
        assert template.render(talk) == "<user>a<assistant>(f1)<tool>x1<assistant>b"
    assert "what was said beside calls was left out" in caplog.text
    assert template.render(talk[:3]) == "<user>a<assistant>Look:<assistant>(f1)<tool>x1"


def test_results_that_a_question_follows_get_an_empty_answer_where_a_template_asks_for_one() -> None:
    source = LOOP.replace("WORDS", "m.content")
    talk = [user("a"), assistant("", call("f", "1")), result("x", "1"), user("b")]
    assert ChatTemplate(source).render(talk) == "<user>a<assistant>(f1)<tool>x1<user>b"
    twice = "loop.previtem and loop.previtem.role in ('tool', 'user') and m.role == 'user'"
    strict = "{{ raise_exception('answer first') if " + twice + " }}"
    template = ChatTemplate(source.replace("<{{", strict + "<{{", 1))
    assert template.render(talk) == "<user>a<assistant>(f1)<tool>x1<assistant> <user>b"
    unanswered = [user("a"), assistant("", call("f", "1")), user("b")]
    assert ChatTemplate(source).render(unanswered) == "<user>a<assistant>(f1)<user>b"


ONE = "{{ raise_exception('one call') if m.tool_calls and m.tool_calls | length > 1 }}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP.replace("WORDS", ONE + "{{ m.content }}").replace("{{ {{", "{{").replace("}} }}", "}}"),
        LOOP.replace("WORDS", "m.content").replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    ],
    ids=["refused", "left out"],
)
def test_calls_of_one_turn_are_turns_of_their_own_where_a_template_takes_one(source: str) -> None:
    source = source.replace("{{ " + ONE + "{{", ONE + "{{")
    talk = [
        user("a"),
        assistant("Look:", call("f", "1"), call("g", "2"), call("f", "3")),
        result("y", "2"),
        result("x", "1"),
        user("b"),
    ]
    text = ChatTemplate(source).render(talk)
    assert text == "<user>a<assistant>Look:(f1)<tool>x1<assistant>(g2)<tool>y2<assistant>(f3)<user>b"
    assert len(talk[1]["tool_calls"]) == 3


def test_results_stand_behind_their_calls_whatever_their_order() -> None:
    """Every result is looked at a few times, however many there are."""
    looks = 0

    class Result(dict[str, Any]):
        def get(self, *args: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().get(*args)

    ids = [f"c{number}" for number in range(300)]
    calls = [{"id": one, "function": {"name": "f", "arguments": "{}"}} for one in ids]
    results = [Result(role="tool", tool_call_id=one, content=one) for one in ["x", *reversed(ids), "y", "c7"]]
    last = Result(role="user", content="Well?")
    turns = one_call_a_turn([{"role": "assistant", "content": "", "tool_calls": calls}, *results, last])
    for number, one in enumerate(ids):
        call, result = turns[2 * number : 2 * number + 2]
        assert (call["tool_calls"], result["content"]) == ([calls[number]], one)
    assert [turn["content"] for turn in turns[2 * len(ids) :]] == ["x", "y", "c7", "Well?"]
    assert looks < 5 * len(results)


def test_calls_that_show_only_if_results_follow_are_known() -> None:
    shown = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}" + SHOWN + "{% endif %}{% endfor %}"
    )
    talk = [user("a"), assistant("Look:", call("f", "1")), result("x", "1")]
    assert ChatTemplate("{{ tools }}" + shown).render(talk, tools=TOOLS).endswith("<assistant>Look:(f1)<tool>x")


def test_ids_of_calls_have_the_form_that_the_model_knows() -> None:
    talk = [
        user("a"),
        assistant("", call("f", "call_0a-_"), {"type": "function", "function": {"name": "g", "arguments": {}}}),
        result("x", "call_0a-_"),
        assistant("", call("g", "abcdefghi")),
        result("y", "abcdefghi"),
    ]
    mistral = ChatTemplate(LOOP.replace("WORDS", "m.content") + "{# [TOOL_CALLS] #}{{ tools }}").render(talk)
    ids = [part.partition("(")[2][1:10] for part in mistral.split(")")[:3]]
    assert all(each.isalnum() and len(each) == 9 for each in ids)
    assert len(set(ids)) == 3
    assert ids[2] == "abcdefghi"
    assert mistral.startswith(f"<user>a<assistant>(f{ids[0]})(g{ids[1]})<tool>x{ids[0]}<assistant>(gabcdefghi)")
    kimi = ChatTemplate(LOOP.replace("WORDS", "m.content") + "{# <|tool_calls_section_begin|> #}{{ tools }}").render(
        talk
    )
    assert kimi.startswith(
        "<user>a<assistant>(ffunctions.f:0)(gfunctions.g:1)<tool>xfunctions.f:0"
        "<assistant>(gfunctions.g:2)<tool>yfunctions.g:2"
    )
    other = ChatTemplate(LOOP.replace("WORDS", "m.content")).render(talk)
    assert other.startswith("<user>a<assistant>(fcall_0a-_)(g)<tool>xcall_0a-_")


def test_a_result_whose_call_was_cut_off_the_conversation_has_such_an_id_too() -> None:
    """Clients leave the oldest turns out where the context is full."""
    refused = "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    source = LOOP.replace("WORDS", refused + "{{ m.content }}").replace("{{ {%", "{%").replace("}} }}", "}}")
    talk = [result("x", "call_0a-_b"), user("a"), result("y", "abcdefghi")]
    text = ChatTemplate(source + "{# [TOOL_CALLS] #}{{ tools }}").render(talk)
    assert re.match(r"<tool>x[0-9a-f]{9}<user>a<tool>yabcdefghi", text)


@pytest.mark.parametrize("fenced", [True, False])
def test_deepseeks_models_are_told_of_tools_and_asked_for_calls_as_their_templates_show_them(fenced: bool) -> None:
    opening = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
    call_shown = "function<｜tool▁sep｜>{}\n```json\n{}\n```" if fenced else "{}<｜tool▁sep｜>{}"
    filled = call_shown.format("{{ c.function.name }}", "{{ c.function.arguments }}").replace("\n", "{{ '\\n' }}")
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        + opening + filled + "<｜tool▁call▁end｜>{% endfor %}{% endfor %}"
    )  # fmt: skip
    template = ChatTemplate(source)
    assert (template.traits.tool_format, template.traits.call_format) == (None, "deepseek")
    text = template.render([user("a"), assistant("", call("f")), result("x")], tools=TOOLS)
    assert text.endswith(
        "<user>a<assistant>" + opening + call_shown.format("f", "{'a': 1}") + "<｜tool▁call▁end｜><tool>x"
    )
    told = text.partition("<user>")[0]
    assert opening + call_shown.format("NAME", "{...}") + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>" in told
    assert '{"name": "g", "description": "", "parameters": {}}' in told
    chatml = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert chatml.traits.call_format == "json"


SPOKEN = {
    "<|tool_list_start|>": '<|tool_call_start|>[f(a=1, b="x\\n", c=[true, null])]<|tool_call_end|>',
    "tool_declare<|im_middle|>": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"a": 1, "b": "x\\n", "c": [true, null]}<|tool_call_end|><|tool_calls_section_end|>',
    "<|/tool|>": '<|tool_call|>[{"name": "f", "arguments": {"a": 1, "b": "x\\n", "c": [true, null]}}]<|/tool_call|>',
    "<function_calls>": '<function_calls>f(a=1, b="x\\n", c=[true, null])</function_calls>',
}


@pytest.mark.parametrize("mark", SPOKEN)
def test_calls_that_a_template_leaves_out_are_written_as_its_model_writes_them(mark: str) -> None:
    source = "{{ tools | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{# " + mark + " #}"
    made = call("f")
    made["function"]["arguments"] = {"a": 1, "b": "x\n", "c": [True, None]}
    text = ChatTemplate(source).render([user("a"), assistant("Look:", made), result("y")], tools=TOOLS)
    assert text == f"2<user>a<assistant>Look:\n{SPOKEN[mark]}<tool>y"


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_no_content_is_no_text(message: dict[str, Any]) -> None:
    for name in TEMPLATES:
        assert "None" not in library(name).render([user("a"), message, user("b")])
    assert ChatTemplate("{% for m in messages %}{{ m.content + '|' }}{% endfor %}").render([message]) == "|"
