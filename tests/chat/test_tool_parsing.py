"""Calls of tools found in answers, format by format; the answers are as the formats' authors show them."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite.chat.answer import AnswerFormat
from aphrodite.chat.events import CallArguments, CallStart, Event, ParsedAnswer, TextPiece
from aphrodite.chat.formats import ToolFormat
from aphrodite.chat.tools.json_text import JsonScanner, MalformedCallError
from aphrodite.chat.tools.parser import ToolParser
from aphrodite.chat.traits import CONTROL_TOKEN, Reasoning

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {}},
    },
    "now": {"type": "object", "properties": {}},
}
PARIS = {"city": "Paris"}


def parse(tool_format: str, *pieces: str, reasoning: Reasoning | None = None) -> ParsedAnswer:
    parser = AnswerFormat(reasoning, tool_format=tool_format, schemas=SCHEMAS).parser()
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return ParsedAnswer.of([*events, *parser.finish()])


def calls(answer: ParsedAnswer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


# Format, what the model writes, text, calls.
FOUND: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "",
     [("get_weather", PARIS)]),
    ("hermes", ('I will look.\n\n<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>\n'
     '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'), "I will look.",
     [("get_weather", PARIS), ("now", {})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', "Done.", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "",
     [("get_weather", PARIS)]),
    ("hermes", ('<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb", "x": [1, -2.5e3, true, {}, []]}}'
     "</tool_call>"), "", [("get_weather", {"city": "a\nb", "x": [1, -2500.0, True, {}, []]})]),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}, "id": 7}</tool_call>', "",
     [("now", {})]),
    ("hermes", '<tool_call>[{"name": "now"}, {"name": "now", "arguments": {}}]</tool_call>', "",
     [("now", {}), ("now", {})]),
    ("qwen3_coder", ("<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
     "</parameter>\n</function>\n</tool_call>"), "", [("get_weather", {"city": "Paris", "days": 3})]),
    ("qwen3_coder", "Well.\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>",
     "Well.", [("get_weather", {"city": "12"})]),
    ("qwen3_coder", "<tool_call><function=now></function></tool_call>", "", [("now", {})]),
    ("glm", ("I see.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days"
     "</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"), "I see.", [("get_weather", {"city": "Paris", "days": 3})]),
    ("glm", "<tool_call>now</tool_call><tool_call>now\n</tool_call>", "", [("now", {}), ("now", {})]),
    ("glm4", 'get_weather\n{"city": "Paris"}', "", [("get_weather", PARIS)]),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", PARIS)]),
    ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city":"Paris"}}',  # noqa: E501
     "", [("now", {}), ("get_weather", PARIS)]),
    ("llama3", '[get_weather(city="Paris", days=3), now()]', "", [("get_weather", PARIS | {"days": 3}), ("now", {})]),
    ("llama3", '<function=get_weather>{"city": "Paris"}</function>', "", [("get_weather", PARIS)]),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', "",
     [("get_weather", PARIS)]),
    ("mistral", 'Let me see.[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
     "Let me see.", [("now", {}), ("now", {})]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now{}', "",
     [("get_weather", PARIS), ("now", {})]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', "", [("get_weather", PARIS)]),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}', "", [("now", {})]),
    ("deepseek", ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
     '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"), "", [("get_weather", PARIS), ("now", {})]),
    ("deepseek", ('Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"), "Hm.", [("get_weather", PARIS)]),
    ("command_r", ('<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
     '{"city": "Paris"}}\n]<|END_ACTION|>'), "", [("get_weather", PARIS)]),
    ("command_r", ('Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n'
     '            "city": "Paris"\n        }\n    }\n]```'), "", [("get_weather", PARIS)]),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [("get_weather", PARIS)]),
    ("granite", 'Look:\n<tool_call>{"name": "now", "arguments": {}}</tool_call>', "Look:", [("now", {})]),
    ("llama3", '<|python_start|>[get_weather(city="Paris")]<|python_end|>', "", [("get_weather", PARIS)]),
    ("llama3", 'So: <|python_start|>{"name": "now", "parameters": {}}<|python_end|>', "So:", [("now", {})]),
    ("llama3", """[get_weather(city='It\\'s\\n"so"', units=(1, -2.5, [True, None, {'a': false}],))]""", "",
     [("get_weather", {"city": 'It\'s\n"so"', "units": [1, -2.5, [True, None, {"a": False}]]})]),
    ("deepseek_v32", (
        'Hm.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">12</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
     ), "Hm.", [("get_weather", {"city": "12", "days": 3}), ("now", {})]),
    ("deepseek_v32", '<｜DSML｜tool_calls><｜DSML｜invoke name="now"></｜DSML｜invoke></｜DSML｜tool_calls>', "",
     [("now", {})]),
    ("kimi_k2", (
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>"
     ), "Hm.", [("get_weather", PARIS), ("now", {})]),
    ("kimi_k2", "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>", "", [("now", {})]),
    ("lfm2", '<|tool_call_start|>[get_weather(city="Paris", days=07), now()]<|tool_call_end|>I look.', "I look.",
     [("get_weather", PARIS | {"days": 7}), ("now", {})]),
    ("lfm2", """<|tool_call_start|>[get_weather(from='a\nb', city='''it's "x"''', units='')]<|tool_call_end|>""", "",
     [("get_weather", {"from": "a\nb", "city": 'it\'s "x"', "units": ""})]),
    ("lfm2", '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>', "", [("now", {})]),
    ("lfm2", "<|tool_call_start|>[now(), get_weather(city=", ", get_weather(city=",
     [("now", {})]),
    ("gemma4", (
        '<|tool_call>call:get_weather{city:<|"|>Paris, {1}<|"|>,days:3,units:[<|"|>a<|"|>,true,{b:null,c:x y}]}'
        "<tool_call|>"
     ), "", [("get_weather", {"city": "Paris, {1}", "days": 3, "units": ["a", True, {"b": None, "c": "x y"}]})]),
    ("gemma4", "Hm.<|tool_call>call:now{}<tool_call|><|tool_call>call:get_weather{city: 12 }<tool_call|>", "Hm.",
     [("now", {}), ("get_weather", {"city": "12"})]),
    ("gemma4", '<|tool_call>call:get_weather{<|"|>city<|"|>:"Paris"}<tool_call|>', "", [("get_weather", PARIS)]),
    ("functiongemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>", "",
     [("get_weather", PARIS)]),
    ("minimax_m2", (
        'I look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
     ), "I look.", [("get_weather", PARIS | {"days": 3}), ("now", {})]),
    ("seed_oss", (
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>"
     ), "", [("get_weather", PARIS)]),
    ("step3", (
        '<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="get_weather">'
        '<steptml:parameter name="city">Paris</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n'
        "<｜tool_calls_end｜>"
     ), "", [("get_weather", PARIS)]),
    ("hunyuan", '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now"}]</tool_calls>',
     "", [("get_weather", PARIS), ("now", {})]),
    ("hunyuan", '<tool_calls>\n{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}}\n</tool_calls>', "",
     [("now", {}), ("now", {})]),
    ("nemotron", 'So.\n\n<TOOLCALL>[{"name": "now", "arguments": {}}]</TOOLCALL>', "So.", [("now", {})]),
    ("phi4_mini", '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>', "", [("now", {})]),
    ("phi4_mini", '<|tool_call|>{"name": "now", "arguments": {}}<|/tool_call|>', "", [("now", {})]),
    ("phi4_mini", 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [("get_weather", PARIS)]),
    ("internlm", (
        'I look.<|action_start|> <|plugin|>\n{"name": "get_weather", "parameters": {"city": "Paris"}}<|action_end|>'
     ), "I look.", [("get_weather", PARIS)]),
    ("apertus", '<|tools_prefix|>[{"get_weather": {"city": "Paris"}}, {"now": {}}]<|tools_suffix|>', "",
     [("get_weather", PARIS), ("now", {})]),
    ("olmo3", '<function_calls>get_weather(city="Paris", days=3)\nnow()</function_calls>', "",
     [("get_weather", PARIS | {"days": 3}), ("now", {})]),
    ("minicpm5", (
        'Hm. <function name="get_weather"><param name="city"><![CDATA[a <b>\n</c>]]></param>'
        '<param name="days">3</param></function><function name="now"></function>'
     ), "Hm.", [("get_weather", {"city": "a <b>\n</c>", "days": 3}), ("now", {})]),
    ("gigachat3", 'Hm.<|function_call|>{"name": "now", "arguments": {}}', "Hm.", [("now", {})]),
    ("gpt_oss", ("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
     '{"city": "Paris"}<|call|>'), "", [("get_weather", PARIS)]),
    ("gpt_oss", ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.now<|channel|>commentary json"
     "<|message|>"), "", [("now", {})]),
    ("json", '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', "", [("get_weather", PARIS)]),
    ("json", '\n[{"name": "now"}]', "", [("now", {})]),
    ("json", 'Yes.\n<tool_call>{"name": "now", "arguments": {}}</tool_call>', "Yes.", [("now", {})]),
]  # fmt: skip

# What is no call stays text, all of it.
TEXTS = [
    ("hermes", "Nothing to call. <tool_ is not a mark, nor is <tool_call"),
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
    ("hermes", ' a\n<tool_call>{"name": 5, "arguments": {}}</tool_call> b\n'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "argu'),
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"}}</tool_call>'),
    ("hermes", "<tool_call>"),
    ("hermes", '{"name": "now", "arguments": {}}'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("qwen3_coder", "<tool_call><function=a b></function></tool_call>"),
    ("glm", "<tool_call>no name at all</tool_call>"),
    ("glm4", "get_weather of tomorrow"),
    ("llama3", '{"name": "unknown", "parameters": {}}'),
    ("llama3", '{"answer": 42}'),
    ("llama3", "{ a brace"),
    ("llama3", "[Laughs] Well, [now()] is the time."),
    ("llama3", "[now(1)]"),
    ("llama3", "[now(**x)]"),
    ("llama3", "[now(a=open('x'))]"),
    ("llama3", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS] ?"),
    ("mistral", "[TOOL_CALLS]"),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing"),
    ("command_r", "Action: he opened the door."),
    ("granite", "<|tool_call|>none"),
    ("llama3", "<|python_start|>print(1)<|python_end|>"),
    ("llama3", "[now(a=1"),
    ("deepseek_v32", '<｜DSML｜function_calls><｜DSML｜invoke name="a b"></｜DSML｜invoke></｜DSML｜function_calls>'),
    ("deepseek_v32", "<｜DSML｜function_calls>"),
    ("kimi_k2", "<|tool_call_begin|>functions.:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    ("kimi_k2", "<|tool_calls_section_begin|>now"),
    ("lfm2", "<|tool_call_start|>[]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[now(**x)]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[now(a='\\xzz')]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[now(a=nan)]"),
    ("lfm2", "<|tool_call_start|>[now(a='x"),
    ("gemma4", "<|tool_call>call:now{a:<tool_call|>"),
    ("gemma4", "<|tool_call>call:now{a"),
    ("gemma4", "<|tool_call>now{}<tool_call|>"),
    ("functiongemma", "<start_function_call>call:{}<end_function_call>"),
    ("minimax_m2", "<minimax:tool_call><invoke></invoke></minimax:tool_call>"),
    ("seed_oss", "<seed:tool_call>now</seed:tool_call>"),
    ("step3", '<｜tool_calls_begin｜><｜tool_call_begin｜>code<｜tool_sep｜><steptml:invoke name="now">'),
    ("hunyuan", "<tool_calls>[]</tool_calls>"),
    ("hunyuan", "<tool_calls>none</tool_calls>"),
    ("nemotron", "<TOOLCALL>"),
    ("phi4_mini", "import functools[a]"),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
    ("internlm", "<|action_start|><|interpreter|>\nprint(1)<|action_end|>"),
    ("apertus", '<|tools_prefix|>["now"]<|tools_suffix|>'),
    ("olmo3", "<function_calls></function_calls>"),
    ("olmo3", "<function_calls>now</function_calls>"),
    ("minicpm5", '<function name="a b"></function>'),
    ("minicpm5", '<function name="now"><param>1</param></function>'),
    ("gigachat3", "<|function_call|>now()"),
    ("json", "```python\nprint(1)\n```"),
    ("json", "  "),
    ("json", ""),
]


@pytest.mark.parametrize(("tool_format", "text", "said", "expected"), FOUND)
def test_calls_are_found(tool_format: str, text: str, said: str, expected: list[tuple[str, Any]]) -> None:
    whole = parse(tool_format, text)
    assert (whole.text, calls(whole)) == (said, expected)
    assert parse(tool_format, *text) == whole


@pytest.mark.parametrize(("tool_format", "text"), TEXTS)
def test_what_is_no_call_stays_text(tool_format: str, text: str) -> None:
    for pieces in ((text,), tuple(text)):
        answer = parse(tool_format, *pieces)
        assert (answer.text, answer.calls) == (text, [])


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_same_and_loses_nothing(data: st.DataObject) -> None:
    examples = [(tool_format, text) for tool_format, text, *_ in [*FOUND, *TEXTS]]
    tool_format, text = data.draw(st.sampled_from(examples))
    if data.draw(st.booleans()):  # damaged
        start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = (
            text[:start]
            + data.draw(st.sampled_from(["", "{", '"', "'", "<tool_call>", "x", "\\", "\\ud800", " \n"]))
            + text[end:]
        )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(tool_format, text)
    assert parse(tool_format, *pieces) == whole
    msgspec.json.encode(whole)  # whatever it is, an answer can hold it
    if tool_format != "gpt_oss" and not whole.calls:
        assert whole.text == text


def test_every_format_has_examples() -> None:
    assert {tool_format for tool_format, *_ in FOUND} == set(get_args(ToolFormat))


def test_the_name_comes_first_and_arguments_as_they_are_written() -> None:
    parser = ToolParser("hermes", SCHEMAS)
    assert parser.feed("Look. <tool") == [TextPiece("Look.")]
    assert parser.feed('_call>{"name": "get_weather", "arg') == []
    assert parser.feed('uments": {') == [CallStart(0, "get_weather"), CallArguments(0, "{")]
    assert parser.feed('"city": "Par') == [CallArguments(0, '"city": "Par')]
    assert parser.feed('is"}}</tool_call>\n<tool_call>{"name": "now"}') == [
        CallArguments(0, 'is"}'), CallStart(1, "now"), CallArguments(1, "{}"),
    ]  # fmt: skip
    assert parser.finish() == []


def test_a_call_that_breaks_off_stays_one() -> None:
    cut = parse("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par')
    assert [(call.name, call.arguments) for call in cut.calls] == [("get_weather", '{"city": "Par')]
    broken = parse("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": oh no}}</tool_call>')
    assert broken.calls[0].arguments == '{"city": '
    assert broken.text == "oh no}}</tool_call>"


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", r'<tool_call>{"name": "now", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>'),
        ("qwen3_coder", r'<function=now><parameter=a>["\ud800"]</parameter></function>'),
        ("lfm2", r"<|tool_call_start|>[now(a='\ud800', b='\ud83d\ude00')]<|tool_call_end|>"),
        ("gemma4", r'<|tool_call>call:now{a:"\ud800"}<tool_call|>'),
    ],
)
def test_halves_of_characters_never_reach_an_answer(tool_format: str, text: str) -> None:
    (call,) = parse(tool_format, text).calls
    assert isinstance(json.loads(msgspec.json.encode(call.arguments)), str)
    assert ("😀" in call.arguments) == (tool_format == "lfm2")


@pytest.mark.parametrize(
    ("schema", "written", "meant"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "true", "true"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": ["string", "integer"]}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({}, "[1, 2]", [1, 2]),
        ({"type": 5}, "1", 1),
    ],
)
def test_the_schema_says_what_a_value_without_quotes_is(schema: dict[str, Any], written: str, meant: Any) -> None:
    parser = ToolParser("minimax_m2", {"f": {"properties": {"a": schema}}})
    call = f'<invoke name="f"><parameter name="a">{written}</parameter></invoke>'
    answer = ParsedAnswer.of(parser.feed(f"<minimax:tool_call>{call}</minimax:tool_call>"))
    assert calls(answer) == [("f", {"a": meant})]


@pytest.mark.parametrize(
    ("tool_format", "unit"),
    [
        ("minimax_m2", '<minimax:tool_call><invoke name="f"><parameter name="a">'),
        ("qwen3_coder", "<function=f><parameter=a>"),
    ],
)
def test_an_answer_of_beginnings_takes_no_longer_than_its_length(tool_format: str, unit: str) -> None:
    """Each beginning could be read to the end of the answer, in vain."""
    steps = 0

    class Counted(dict[str, dict[str, Any]]):
        def get(self, *args: Any) -> Any:
            nonlocal steps
            steps += 1
            return super().get(*args)

    text = unit * 4000
    parser = ToolParser(tool_format, Counted())
    answer = ParsedAnswer.of([*parser.feed(text), *parser.finish()])
    assert (answer.text, answer.calls) == (text, [])
    assert steps < 40
    halves = ToolParser(tool_format, {})
    again = ParsedAnswer.of([*halves.feed(text[:70_001]), *halves.feed(text[70_001:]), *halves.finish()])
    assert again == answer


def test_white_space_behind_a_call_takes_no_longer_than_its_length() -> None:
    """Models go on with line ends at times; looked at from the first one for each, these took ten minutes."""
    call = '<tool_call>{"name": "now", "arguments": {}}'
    for behind, text in (("", ""), ("</tool_call>", ""), ("</tool_calls>", "</tool_calls>")):
        parser = ToolParser("hermes", SCHEMAS)
        answer = ParsedAnswer.of([*parser.feed(call + "\n" * 500_000 + behind), *parser.finish()])
        assert [(one.name, one.arguments) for one in answer.calls] == [("now", "{}")]
        assert answer.text == text


def test_special_tokens_of_calls_are_marks() -> None:
    """Others are taken out of an answer before it is read."""
    for tool_format, text, *_ in FOUND:
        marks = "\n".join(AnswerFormat(tool_format=tool_format).marks)
        for token in (
            *CONTROL_TOKEN.findall(text),
            *re.findall(r'<\|"\|>|</?escape>|<(?:start|end)_function_call>', text),
        ):
            assert token in marks, (tool_format, token)


def test_calls_behind_reasoning_are_found_and_inside_are_not() -> None:
    think = Reasoning("<think>", "</think>", opened=False, switch=None)
    text = '<think>Or <tool_call>{"name": "now"}</tool_call>?</think>\n\n<tool_call>{"name": "now"}</tool_call>'
    answer = parse("hermes", text, reasoning=think)
    assert answer.reasoning == 'Or <tool_call>{"name": "now"}</tool_call>?'
    assert (answer.text, calls(answer)) == ("", [("now", {})])
    assert parse("hermes", *text, reasoning=think) == answer


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    indent=st.sampled_from([None, 2]),
    damage=st.integers(0, 200),
)
def test_the_scanner_takes_what_json_takes(value: Any, indent: int | None, damage: int) -> None:
    text = json.dumps({"value": value}, ensure_ascii=False, indent=indent)
    scanner = JsonScanner()
    assert "".join(map(scanner.push, text)) == text
    assert scanner.complete
    broken = text[: damage % len(text)] + text[damage % len(text) + 1 :]
    scanner, taken = JsonScanner(), ""
    try:
        for char in broken:
            taken += scanner.push(char)
    except MalformedCallError:
        with pytest.raises(ValueError, match=r"."):
            json.loads(broken)
    else:
        assert not scanner.complete or json.loads(taken) is not None
