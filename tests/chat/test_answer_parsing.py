"""Answers taken apart: reasoning and text, whatever the cuts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite.chat.answer import AnswerFormat
from aphrodite.chat.events import Event, ParsedAnswer, ReasoningPiece, TextPiece
from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.chat.table import TEMPLATES
from aphrodite.chat.traits import TemplateTraits, describe_template

NO_TRAITS = TemplateTraits(
    system_role=True,
    names=False,
    stop=(),
    tool_format=None,
    call_format="json",
    calls=False,
    calls_alone=False,
    calls_with_words=False,
    several_calls=False,
    arguments_as_text=False,
    documents=False,
    reasoning=None,
)


def marked(name: str, **state: bool) -> AnswerFormat:
    return AnswerFormat(reasoning_marks(NO_TRAITS, name), **state)


def parse(answers: AnswerFormat, *pieces: str) -> ParsedAnswer:
    parser = answers.parser()
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return ParsedAnswer.of([*events, *parser.finish()])


# Format, state of the prompt, what the model writes, reasoning, text.
REASONED = [
    ("think", {}, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    ("think", {"is_open": True}, "Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    ("think", {"is_open": True}, "<think>\nTwo.</think>Four.", "Two.", "Four."),
    ("think", {}, "<think>\n\n</think>\n\nFour.", "", "Four."),
    ("think", {}, "<think>never done", "never done", ""),
    ("think", {"is_open": True}, "never done </thi", "never done </thi", ""),
    ("think", {}, "Four. <think> is a tag.", "", "Four. <think> is a tag."),
    ("think", {}, "\n four </think>", "", "\n four </think>"),
    ("think", {}, "  <thin", "", "  <thin"),
    ("think", {}, "", "", ""),
    ("mistral", {}, "[THINK]Two and two.[/THINK]Four.", "Two and two.", "Four."),
    ("seed", {}, "<seed:think>a</seed:think>b", "a", "b"),
    ("command_r", {}, "<|START_THINKING|>I see.<|END_THINKING|>Four.", "I see.", "Four."),
    ("granite", {}, "Here is my thought process:\nTwo.\n\nHere is my response:\nFour.", "Two.", "Four."),
    ("apertus", {}, "<|inner_prefix|>Two.<|inner_suffix|>Four.", "Two.", "Four."),
    ("apriel", {}, "Here are my reasoning steps:\nTwo.\n[BEGIN FINAL RESPONSE]\nFour.\n[END FINAL RESPONSE]\n", "Two.",
     "Four."),
    ("apriel", {"is_open": True}, "Two.\n[BEGIN FINAL RESPONSE]Four. [END", "Two.", "Four. [END"),
    ("hunyuan", {}, "<think>\nTwo.\n</think>\n<answer>\nFour.\n</answer>", "Two.", "Four."),
    ("hunyuan", {}, "<answer>\nFour. </ans <b>", "", "Four. </ans <b>"),
    ("hunyuan", {}, "<think></think>Four </answer>", "", "Four </answer>"),
    ("hunyuan", {}, "<think></think><ans", "", "<ans"),
    ("hunyuan", {}, "<think></think><answer>Four</answer> Five", "", "Four Five"),
    ("ernie", {"is_open": True}, "Two.\n</think>\n\n\n<response>\nFour\n\nor so.\n</response>\n", "Two.",
     "Four\n\nor so."),
    ("ernie", {"is_open": True}, "Two.\n</think>\n\n\n<tool_call>", "Two.", "<tool_call>"),
    ("harmony", {}, "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
     "Two.", "Four."),
    ("harmony", {}, "<|channel|>final<|message|>Four.<|return|>", "", "Four."),
    ("harmony", {}, (
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>It is."
     ), "Hm.\n\nSo.", "I will look.\n\nIt is."),
    ("harmony", {}, "<|channel|>analysis<|message|>Hm", "Hm", ""),
    ("harmony", {}, "<|channel|>ana", "", ""),
    ("harmony", {}, "Plain text <|e", "", "Plain text <|e"),
    ("harmony", {"is_open": True}, " more.<|end|><|start|>assistant<|channel|>final<|message|>4", " more.", "4"),
    ("harmony", {"is_text": True}, " and more.", "", " and more."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "state", "text", "reasoning", "answer"), REASONED)
def test_reasoning_is_split_from_the_text(
    name: str, state: dict[str, bool], text: str, reasoning: str, answer: str
) -> None:
    whole = parse(marked(name, **state), text)
    assert (whole.reasoning, whole.text, whole.calls) == (reasoning, answer, [])
    assert parse(marked(name, **state), *text) == whole


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_same(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["think", "harmony", "granite", "hunyuan", "apriel"]))
    marks = {
        "think": ["<think>", "</think>", "</th", "<"],
        "hunyuan": ["<think>", "</think>", "<answer>", "</answer>", "</ans", "<"],
        "apriel": ["Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]", "[END"],
        "granite": ["Here is my thought process:", "Here is my response:", "Here is"],
        "harmony": ["<|start|>assistant", "<|channel|>analysis", "<|channel|>final", "<|message|>", "<|end|>", "<|e"],
    }[name]
    answers = marked(name, is_open=data.draw(st.booleans()))
    parts = data.draw(st.lists(st.sampled_from([*marks, " ", "\n", "a", "word ", "."]), max_size=12))
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(answers, *pieces) == parse(answers, text)


def test_reasoning_comes_as_it_is_written() -> None:
    parser = marked("think").parser()
    assert parser.feed("<think>One ") == [ReasoningPiece("One")]
    assert parser.feed("two </") == [ReasoningPiece(" two")]
    assert parser.feed("think>\n") == []
    assert parser.feed("Text ") == [TextPiece("Text ")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("<think>ab</think>cd", len("<think>ab</think>")), ("<think>ab", 9), ("ab", 0), ("  <think>a</think>", 18)],
)
def test_reasoning_characters_include_the_marks(text: str, count: int) -> None:
    parser = marked("think").parser()
    for char in text:
        parser.feed(char)
    parser.finish()
    assert parser.reasoning_chars == count


def test_the_template_tells_the_marks() -> None:
    traits = describe_template(TEMPLATES["deepseek-r1"].source)
    assert reasoning_marks(traits, None) == traits.reasoning
    assert reasoning_marks(traits, "none") is None
    assert reasoning_marks(describe_template(TEMPLATES["chatml"].source), None) is None
    assert AnswerFormat(None).plain
