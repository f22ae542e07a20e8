"""Conversations that a template does not take as they come."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from aphrodite.chat import limits
from aphrodite.chat.template import ChatTemplate
from aphrodite.errors import InvalidRequestError

Messages = list[dict[str, Any]]

# As strict as the strictest of published ones: no system role, turns alternate and begin with the user's.
STRICT = """\
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}
<{{ m.role }}>{{ m.content }}</>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""
# Takes a system message, but only at the start.
FIRST_ONLY = """\
{%- for m in messages -%}
{%- if m.role == 'system' and not loop.first -%}{{ raise_exception('System message must be first') }}{%- endif -%}
<{{ m.role }}>{{ m.content }}</>
{%- endfor -%}
"""
# Leaves system messages out without a word.
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CASES: dict[str, tuple[str, Messages, str]] = {
    "fits": (STRICT, [user("a"), assistant("b"), user("c")], "<user>a</><assistant>b</><user>c</><assistant>"),
    "turns in a row": (
        STRICT,
        [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
        "<user>a\n\nb</><assistant>c\n\nd</><user>e</><assistant>",
    ),
    "no system role": (STRICT, [system("s"), user("a")], "<user>s\n\na</><assistant>"),
    "system and greeting": (STRICT, [system("s"), assistant("b"), user("c")],
                            "<user>s</><assistant>b</><user>c</><assistant>"),
    "greeting": (STRICT, [assistant("b"), user("c")], "<user></><assistant>b</><user>c</><assistant>"),
    "note at depth": (STRICT, [user("a"), assistant("b"), system("n"), user("c")],
                      "<user>a</><assistant>b</><user>n\n\nc</><assistant>"),
    "system last": (STRICT, [user("a"), assistant("b"), system("n")],
                    "<user>a</><assistant>b</><user>n</><assistant>"),
    "two systems": (FIRST_ONLY, [system("s"), system("t"), user("a")], "<system>s\n\nt</><user>a</>"),
    "later system": (FIRST_ONLY, [system("s"), user("a"), system("n"), user("b")],
                     "<system>s</><user>a\n\nn\n\nb</>"),
    "left out": (SILENT, [system("Be kind."), user("a"), assistant("b")], "<user>Be kind.\n\na</><assistant>b</>"),
    "left out only where turns are joined": (
        STRICT.replace("m in messages", "m in messages if m.role != 'system'"),
        [user("a"), system("Be kind."), user("b")],
        "<user>a\n\nBe kind.\n\nb</><assistant>",
    ),
    "nothing but system": (STRICT, [system("s"), system("t")], "<user>s\n\nt</><assistant>"),
    "nothing but system, at which the template fails": (
        "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{{ turns[0].content + '!' }}",
        [system("s")],
        "s!",
    ),
    "nothing to leave out": (SILENT, [system(" "), user("a")], "<user>a</>"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_conversations_are_changed_as_little_as_the_template_needs(case: str) -> None:
    source, messages, expected = CASES[case]
    before = [dict(message) for message in messages]
    assert ChatTemplate(source).render(messages) == expected
    assert messages == before


def test_parts_are_joined_as_parts() -> None:
    source = (
        "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}{{ raise_exception('twice') }}"
        "{% endif %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    )
    messages = [user("a"), {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}]
    assert ChatTemplate(source).render(messages) == "[a][b][c]"


def test_tools_turns_are_never_joined() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    turn = "{{ m.role }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments }}{% endif %} "
    source = "{% for m in messages %}" + turn + "{% endfor %}{{ raise_exception('no') if messages | length == 6 }}"
    messages = [user("a"), user("b"), assistant("", tool_calls=[call]), assistant("", tool_calls=[call]),
                {"role": "tool", "content": "x", "tool_call_id": "1"},
                {"role": "tool", "content": "y", "tool_call_id": "1"}]  # fmt: skip
    assert ChatTemplate(source).render(messages) == "user assistant{} assistant{} tool tool "


def test_what_no_form_suits_is_refused_for_the_first_reason() -> None:
    source = "{{ raise_exception('two turns') if messages | length == 2 }}{{ raise_exception('one turn') }}"
    with pytest.raises(InvalidRequestError, match="two turns"):
        ChatTemplate(source).render([user("a"), user("b")])
    with pytest.raises(InvalidRequestError, match="never") as error:
        ChatTemplate("{{ raise_exception('never') }}").render([user("a")])
    assert error.value.param == "messages"


def test_the_log_says_once_what_is_done(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(STRICT, name="the test's template")
    with caplog.at_level(logging.INFO, "aphrodite"):
        for _ in range(3):
            template.render([user("a"), user("b")])
            template.render([system("s"), user("b")])
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert all("the test's template" in line for line in lines)
    assert "one turn" in lines[0]
    assert "System role not supported" in lines[1]


# --- names ---


def test_names_stand_before_texts() -> None:
    messages = [user("hi", name="Ann"), assistant("Bo: ho", name="Bo"), user("x"), system("You are Bo.")]
    text = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}").render(messages)
    assert text == "user=Ann: hi|assistant=Bo: ho|user=x|system=You are Bo.|"


def test_a_template_that_shows_names_keeps_them() -> None:
    source = "{% for m in messages %}{{ m.name or m.role }}={{ m.content }}|{% endfor %}"
    assert ChatTemplate(source).render([user("hi", name="Ann"), assistant("ho")]) == "Ann=hi|assistant=ho|"


def test_a_tools_name_is_not_a_speakers() -> None:
    messages = [user("a"), {"role": "tool", "name": "f", "content": "x"}]
    assert ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}").render(messages) == (
        "a|<tool_response>\nx\n</tool_response>|"
    )


def test_a_name_stands_before_the_first_part() -> None:
    messages = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, "b"]}]
    assert ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages) == "Ann: a\nb"


# --- an answer that is begun ---


def test_an_answer_is_continued_after_turns_became_one() -> None:
    template = ChatTemplate(STRICT)
    messages = [system("s"), user("a"), assistant("b"), assistant("c ")]
    assert template.render(messages, continue_final_message=True) == "<user>s\n\na</><assistant>b\n\nc "


def test_an_answer_stands_behind_the_opening_where_the_template_does_not_show_it() -> None:
    thinks = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | upper if m.role == 'assistant' "
        "else m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [user("a"), assistant("Once upon")]
    assert ChatTemplate(thinks).render(messages, continue_final_message=True) == "<user>a<assistant>Once upon"
    refusal = "{%- if messages[-1].role != 'user' -%}{{ raise_exception('a question must be last') }}{%- endif -%}"
    last_is_users = STRICT.replace("{%- for", refusal + "{%- for", 1)
    text = ChatTemplate(last_is_users).render([system("s"), *messages], continue_final_message=True)
    assert text == "<user>s\n\na</><assistant>Once upon"


def test_an_opening_may_be_the_end_of_the_question() -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    messages = [user("a"), assistant(" Once")]
    assert ChatTemplate(source).render(messages, continue_final_message=True) == "[INST] a [/INST] Once"


def test_an_answer_that_cannot_be_continued_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        ChatTemplate("nothing").render([user("a"), assistant("b")], continue_final_message=True)


# --- tools, documents and variables ---

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_documents_that_a_template_does_not_show_are_refused() -> None:
    template = ChatTemplate(SILENT, name="the test's template")
    with pytest.raises(InvalidRequestError, match="the test's template does not") as error:
        template.render([user("a")], documents=[{"text": "x"}])
    assert error.value.param == "documents"
    assert template.render([user("a")], documents=[]) == "<user>a</>"


def test_tools_that_a_template_does_not_show_are_told_of_in_words(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}", name="the test's")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    talk = [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "tool_call_id": "1", "content": "b"}]
    with caplog.at_level("INFO"):
        text = template.render(talk, tools=TOOLS, add_generation_prompt=False)
    assert text.startswith("<system>You can call tools.")
    assert json.dumps(TOOLS[0]) in text
    assert text.endswith(
        '</><user>a</><assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call></>'
        "<user><tool_response>\nb\n</tool_response></>"
    )
    assert "tools are described in the system message" in caplog.text
    assert template.render([{"role": "system", "content": "S"}, user("a")], tools=TOOLS).startswith(
        "<system>S\n\nYou can call tools."
    )
    assert template.render([user("a")], tools=[]) == "<user>a</>"


def test_earlier_calls_are_told_in_words_where_no_tools_are_offered_any_more() -> None:
    loop = "{% for m in messages %}<{{ m.role }}>{{ m.content + '' }}</>{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    talk = [user("a"), assistant(None, tool_calls=[call]), {"role": "tool", "tool_call_id": "1", "content": "b"}]
    text = ChatTemplate(loop).render(talk, add_generation_prompt=False)
    assert text == (
        '<user>a</><assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call></>'
        "<user><tool_response>\nb\n</tool_response></>"
    )
    knows = "{% for m in messages %}{{ m.role }}{{ m.tool_calls }};{% endfor %}"
    assert ChatTemplate(knows).render(talk, add_generation_prompt=False).endswith("tool;")


@pytest.mark.parametrize("given", ['{"city": "Zürich"}', {"city": "Zürich"}])
def test_arguments_of_calls_reach_a_template_as_it_takes_them(given: Any) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": given}}
    messages = [user("a"), assistant("", tool_calls=[call])]
    loop = "{{% for m in messages %}}{{% for c in m.tool_calls or [] %}}{}{{% endfor %}}{{% endfor %}}{{{{ tools }}}}"
    for shown, expected in (
        ("{{ c.function.arguments | tojson }}", '{"city": "Zürich"}'),
        ("{{ c.function.arguments.items() | list }}", "[('city', 'Zürich')]"),
        ("{{ '<' + c.function.arguments + '>' }}", '<{"city": "Zürich"}>'),
    ):
        assert ChatTemplate(loop.format(shown)).render(messages).startswith(expected)


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    for text in ("not json", "[" * 100_000):
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": text}}
        assert ChatTemplate(source).render([assistant("", tool_calls=[call])]) == text


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_the_reasoning_switch_has_one_name_for_all_templates(name: str) -> None:
    template = ChatTemplate("<think>{{ " + name + " is defined and " + name + " }}")
    assert template.render([user("a")], extra={"enable_thinking": True}) == "<think>True"
    assert template.render([user("a")], extra={"enable_thinking": False}) == "<think>False"


def test_all_forms_of_a_conversation_share_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    deadline = limits.deadline

    def counted(messages: int) -> float:
        made.append(deadline(messages))
        return made[-1]

    monkeypatch.setattr(limits, "deadline", counted)
    messages = [system("s"), user("a"), user("b"), system("c"), assistant("d")]
    template = ChatTemplate("{{ raise_exception('no') }}")
    assert not template.traits.system_role  # found out once, within a time of its own
    made.clear()
    with pytest.raises(InvalidRequestError):
        template.render(messages, continue_final_message=True)
    assert len(made) == 1


# --- reasoning ---

# In the manner of Qwen 3's: what was thought is taken off an answer, and an empty one stands before the last.
THINKS = """\
{%- for m in messages -%}
{%- set text = m.content.split('</think>')[-1].lstrip('\\n') -%}
<{{ m.role }}>{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ text }}</>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>OPENING{%- endif -%}
"""
CLOSED = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
OPENINGS = {"none": "", "switch": CLOSED, "open": "<think>\n", "switched on": "{{ '<think>' if thinking }}"}


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("extra", [None, {"enable_thinking": False}])
def test_reasoning_that_is_begun_is_continued_inside(opening: str, extra: dict[str, Any] | None) -> None:
    template = ChatTemplate(THINKS.replace("OPENING", OPENINGS[opening]))
    messages = [user("a"), assistant("<think>\nOkay, ")]
    text = template.render(messages, continue_final_message=True, extra=extra)
    assert text == "<user>a</><assistant><think>\nOkay, "
    thought = [user("a"), assistant("<think>\nOkay\n</think>\nOnce")]
    text = template.render(thought, continue_final_message=True, extra=extra)
    assert text == "<user>a</><assistant><think>\nOkay\n</think>\nOnce"


def test_an_opening_that_begins_reasoning_is_closed_before_an_answer() -> None:
    refusal = "{{ raise_exception('a question must be last') if messages[-1].role == 'assistant' }}"
    template = ChatTemplate(refusal + THINKS.replace("OPENING", "{{ '<think>\\n' }}"))
    text = template.render([user("a"), assistant("Once upon")], continue_final_message=True)
    assert text == "<user>a</><assistant><think>\n\n</think>\n\nOnce upon"


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]
SHOWN_CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_what_was_thought_reaches_a_template_by_the_name_it_reads(given: str, read: str) -> None:
    source = "{% for m in messages %}[{{ m." + read + " }}]{{ m.tool_plan }}" + SHOWN_CALLS + "{% endfor %}"
    assert ChatTemplate(source).render([user("a"), assistant("b", **{given: "because"})]) == "[][because]"
    called = [user("a"), assistant("", tool_calls=CALLS, **{given: "because"})]
    assert ChatTemplate(source).render(called) == "[][because]because{}"


def test_thoughts_before_calls_with_words_are_left_out_where_a_template_refuses_both() -> None:
    source = (
        "{% for m in messages %}{{ raise_exception('not both') if m.tool_calls and m.content and m.thinking }}"
        "{{ m.thinking }}{{ m.content }}" + SHOWN_CALLS + ";{% endfor %}"
    )
    messages = [user("a"), assistant("b", thinking="t", tool_calls=CALLS), assistant("c", thinking="u")]
    assert ChatTemplate(source).render(messages) == "a;b{};uc;"


# --- tools by other names, and calls that are not shown ---


@pytest.mark.parametrize("name", ["xml_tools", "custom_tools"])
def test_tools_reach_a_template_by_the_name_it_reads(name: str) -> None:
    template = ChatTemplate("{{ " + name + "[0].function.name }}<tool_call>{{ messages[0].content }}")
    assert template.render([user("a")], tools=TOOLS) == "f<tool_call>a"
    other = ChatTemplate("{{ tools | length }}{{ " + name + " is defined }}")
    assert other.render([user("a")], tools=TOOLS) == "1False"


def test_calls_stay_with_a_template_for_tools_that_shows_them() -> None:
    tool_use = "{{ raise_exception('tools?') if not tools }}{% for m in messages %}{{ m.content }}"
    template = ChatTemplate("{{ messages[0].content }}", tool_use=tool_use + SHOWN_CALLS + "<tool_call>{% endfor %}")
    text = template.render([user("a"), assistant("b", tool_calls=CALLS)], tools=TOOLS)
    assert text == "a<tool_call>b{}<tool_call>"


def test_calls_get_a_turn_of_their_own_where_a_template_shows_them_without_words_only() -> None:
    """As DeepSeek's do."""
    shown = "{{ m.content if m.content is not none else '' }}{% if m.content is none %}" + SHOWN_CALLS + "{% endif %}"
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>" + shown + "{% endfor %}")
    assert template.render([user("a"), assistant("", tool_calls=CALLS)]) == "<user>a<assistant>{}"
    said = [user("a"), assistant("b", tool_calls=CALLS), {"role": "tool", "tool_call_id": "1", "content": "x"}]
    assert template.render(said) == "<user>a<assistant>b<assistant>{}<tool>x"
    assert said[1]["content"] == "b"


CALL_TEXTS = ('{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}')


@pytest.mark.parametrize(
    ("mark", "shown"),
    [
        ("<|tool_call|>", f"<|tool_call|>[{', '.join(CALL_TEXTS)}]"),
        ("[]", "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in CALL_TEXTS).lstrip()),
    ],
)
def test_calls_are_texts_where_a_template_with_tools_leaves_them_out(mark: str, shown: str) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("f", {"a": 1}), ("g", "{}"))
    ]
    result = {"role": "tool", "tool_call_id": "f", "content": "x"}
    source = "{{ tools | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source += "{{ '" + mark + "' if false }}"
    text = ChatTemplate(source).render([user("a"), assistant("Look:", tool_calls=calls), result], tools=TOOLS)
    assert text == f"1<user>a<assistant>Look:\n{shown}<tool>x"
