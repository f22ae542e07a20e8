"""What a chat template can do, found out from its text and from how it renders small conversations.

So a checkpoint's template and one of the library are known by the same means: which token ends a turn, whether there is
a system role, in which format tools are called, and how reasoning is marked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

from aphrodite.chat import limits
from aphrodite.chat.formats import ReasoningName, ToolFormat
from aphrodite.chat.jinja import TOOL_VARIABLES, JinjaTemplate
from aphrodite.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How a model marks what it thinks before it answers.

    Attributes:
        start, end: the marks around it.
        opened: the template's opening of the answer already holds `start`, unless variables say otherwise.
        switch: the template's variable that turns reasoning on and off, if it has one.
        around: the marks that may stand around the answer behind it.
    """

    start: str
    end: str
    opened: bool
    switch: str | None
    around: tuple[str, str] = ("", "")

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside reasoning, so that the answer begins with it."""
        return prompt.rstrip().endswith(self.start)

    def begins(self, answer: str) -> bool:
        """Whether an answer begins with reasoning."""
        return answer.lstrip().startswith(self.start)

    def join(self, prompt: str, answer: str) -> str:
        """A rendered prompt and the beginning of its answer, with marks of reasoning once each.

        An opening that holds the start mark gives it up to an answer that has its own; before other answers its
        reasoning is closed, empty.
        """
        if not self.is_open(prompt):
            return prompt + answer
        if self.begins(answer):
            return prompt.rstrip().removesuffix(self.start) + answer.lstrip()
        return f"{prompt}\n{self.end}\n\n{answer}"


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a template can do.

    Attributes:
        system_role: it shows a system message.
        names: it shows the `name` of messages.
        stop: texts that end the assistant's turn, beside the end-of-sequence token.
        tool_format: how the model is asked to call tools; None: it is not told of tools. `json` is any format without
            a name here.
        call_format: the format in which calls are asked for: `tool_format`, or DeepSeek's where calls are shown so and
            no tools, or `json`.
        calls: it shows earlier calls. One that has no variable for tools may do so all the same.
        calls_alone: it shows them only in turns whose content is null.
        calls_with_words: it shows what is said in a turn that calls.
        several_calls: it shows all calls of one turn.
        arguments_as_text: it takes the arguments of earlier calls as JSON text, not as an object.
        documents: it shows documents.
        reasoning: None where the template says nothing of it.
    """

    system_role: bool
    names: bool
    stop: tuple[str, ...]
    tool_format: ToolFormat | None
    call_format: ToolFormat
    calls: bool
    calls_alone: bool
    calls_with_words: bool
    several_calls: bool
    arguments_as_text: bool
    documents: bool
    reasoning: Reasoning | None


# Texts that no template has of itself.
_SYSTEM, _USER, _ANSWER, _NEXT, _NAME, _ARGUMENT, _FUNCTION = "Qs1", "Qu2", "Qa3", "Qn4", "Qm5", "Qg6", "Qf7"
_SECOND, _RESULT = "Qc8", "Qr9"
_BOS, _EOS = "<|aphrodite_bos|>", "<|aphrodite_eos|>"

_TOOL: Final = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}

# In this order: the first format whose mark is in the template's text. Templates of one format may quote another's
# marks in advice to the model, so those that only one format has come first.
_TOOL_MARKS: Final[tuple[tuple[ToolFormat, tuple[str, ...]], ...]] = (
    ("gpt_oss", ("<|channel|>commentary",)),
    ("deepseek", ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("step3", ("<｜tool_calls_begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>", "tool_declare<|im_middle|>")),
    ("lfm2", ("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ")),
    ("gemma4", ("<|tool_call>call:",)),
    ("functiongemma", ("<start_function_call>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("apertus", ("<|tools_prefix|>",)),
    ("olmo3", ("<function_calls>",)),
    ("minicpm5", ("<param name=",)),
    ("gigachat3", ("<|function_call|>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("internlm", ("<|action_start|>",)),
    ("phi4_mini", ("<|/tool|>", "functools")),
    ("qwen3_coder", ("<parameter=",)),
    ("glm", ("<arg_key>",)),
    ("hunyuan", ("<tool_calls>",)),
    ("command_r", ("<|START_ACTION|>", "Write 'Action:'")),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("glm4", ("<|observation|>", "[gMASK]")),
    ("llama3", ("<|python_tag|>", "<|python_start|>", "ipython")),
)
# The start and end marks around reasoning.
REASONING_MARKS: Final[Mapping[ReasoningName, tuple[str, str]]] = {
    "harmony": ("<|channel|>analysis<|message|>", "<|end|>"),
    "command_r": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "gemma": ("<|channel>thought", "<channel|>"),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "apriel": ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    "hunyuan": ("<think>", "</think>"),
    "ernie": ("<think>", "</think>"),
    "think": ("<think>", "</think>"),
    "granite": ("Here is my thought process:", "Here is my response:"),
}
# The marks around the answer behind it, where there are any.
ANSWER_MARKS: Final[Mapping[ReasoningName, tuple[str, str]]] = {
    "apriel": ("", "[END FINAL RESPONSE]"),
    "hunyuan": ("<answer>", "</answer>"),
    "ernie": ("<response>", "</response>"),
}
# In this order: what all shows in the template's text. Granite's marks are plain words, and chosen by name only.
_REASONING_SHOWN: Final[tuple[tuple[ReasoningName, tuple[str, ...]], ...]] = (
    ("harmony", ("<|channel|>analysis",)),
    ("command_r", ("<|START_THINKING|>",)),
    ("mistral", ("[THINK]",)),
    ("seed", ("<seed:think>",)),
    ("gemma", ("<|channel>thought",)),
    ("apertus", ("<|inner_prefix|>",)),
    ("apriel", ("[BEGIN FINAL RESPONSE]",)),
    ("hunyuan", ("</think>", "<answer>", "</answer>")),
    ("ernie", ("</think>", "<response>", "</response>")),
    ("think", ("<think>",)),
    ("think", ("</think>",)),
)
_SWITCHES: Final = ("enable_thinking", "thinking")

CONTROL_TOKEN: Final = re.compile(
    r"<\|[^<>|\s]{1,40}\|?>|<[a-z_]{1,20}\|>|<｜[^<>｜\s]{1,40}｜>|</s>|<(?:start|end)_of_turn>"
    r"|</?seed:[a-z_]{1,40}>|\[/?[A-Z_]{3,20}\]"
)
_STOPS_SHOWN = 2  # of the control tokens between an answer and the next question: its end, and the next turn's start
_HANDOVER: Final = ("<|eom_id|>", "<|observation|>", "<|tool_response>", "<start_function_response>")  # to a tool
# In these formats <|end|> also ends what is thought before the answer; harmony's answers end with the two stops below.
_MANY_MESSAGES: Final = ("<|channel|>", "<|think|>")
_HARMONY_STOPS: Final = ("<|return|>", "<|call|>")


@lru_cache(maxsize=64)
def describe_template(source: str) -> TemplateTraits:
    """What a template (Jinja source) can do.

    Raises:
        InvalidRequestError: it cannot be used at all (see `JinjaTemplate`).
    """
    template = _Probe(JinjaTemplate(source, bos_token=_BOS, eos_token=_EOS))
    tool_format = _tool_format(template)
    calls = _shown_calls(template, "")
    calls_alone = not calls.any
    if calls_alone:
        calls = _shown_calls(template, None)
    return TemplateTraits(
        system_role=_SYSTEM in template(_turn("system", _SYSTEM), _turn("user", _USER)),
        names=_NAME in template({**_turn("user", _USER), "name": _NAME}),
        stop=_stop(template, tool_format),
        tool_format=tool_format,
        call_format=tool_format or ("deepseek" if calls.any and _marked_format(template) == "deepseek" else "json"),
        calls=calls.any,
        calls_alone=calls.any and calls_alone,
        calls_with_words=not calls_alone and any(_ANSWER in shown for shown in _shown_calls(template, _ANSWER)),
        several_calls=any(
            _SECOND in shown for shown in _shown_calls(template, None if calls_alone else "", (_FUNCTION, _SECOND))
        ),
        arguments_as_text=calls.only_text,
        documents="documents" in template.variables,
        reasoning=_reasoning(template),
    )


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


class _Probe:
    """A template that is tried out; all trials together take no longer than one rendering may."""

    def __init__(self, template: JinjaTemplate) -> None:
        self.source = template.source
        self.variables = template.variables
        self._template = template
        self._deadline = limits.deadline(0)

    def __call__(self, *messages: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> str:
        """What the template makes of a conversation; nothing if it refuses it."""
        try:
            return self._template.render(messages, tools=tools, deadline=self._deadline)
        except InvalidRequestError:
            return ""


def _stop(template: _Probe, tool_format: ToolFormat | None) -> tuple[str, ...]:
    if "<|end|>" in template.source and any(mark in template.source for mark in _MANY_MESSAGES):
        return tuple(token for token in _HARMONY_STOPS if "<|channel|>" in template.source)
    shown = template(_turn("user", _USER), _turn("assistant", _ANSWER), _turn("user", _NEXT))
    between = shown.partition(_ANSWER)[2].partition(_NEXT)[0]
    found = [token for token in CONTROL_TOKEN.findall(between) if token not in (_EOS, _BOS)]
    handover = [token for token in _HANDOVER if tool_format is not None and token in template.source]
    return tuple(dict.fromkeys(found[:_STOPS_SHOWN] + handover))


def _tool_format(template: _Probe) -> ToolFormat | None:
    if not template.variables & {"tools", *TOOL_VARIABLES}:
        return None
    return _marked_format(template)


def _marked_format(template: _Probe) -> ToolFormat:
    """The format whose marks are in the template's text."""
    for tool_format, marks in _TOOL_MARKS:
        if any(mark in template.source for mark in marks):
            return tool_format
    return "json"


class _ShownCalls(NamedTuple):
    """What a template makes of an earlier call whose arguments are an object, and of one whose arguments are text."""

    with_object: str
    with_text: str

    @property
    def any(self) -> bool:
        return any(part in shown for shown in self for part in (_ARGUMENT, _FUNCTION))

    @property
    def only_text(self) -> bool:
        """Whether arguments show only where they are text."""
        return _ARGUMENT in self.with_text and _ARGUMENT not in self.with_object


def _shown_calls(template: _Probe, content: str | None, names: tuple[str, ...] = (_FUNCTION,)) -> _ShownCalls:
    forms = ({_ARGUMENT: 1}, f'{{"{_ARGUMENT}": 1}}')
    return _ShownCalls(*(_shown_turn(template, content, names, form) for form in forms))


def _shown_turn(template: _Probe, content: str | None, names: tuple[str, ...], arguments: Any) -> str:
    functions = [{"name": name, "arguments": arguments} for name in names]
    calls = [{"id": f"abcdefgh{i}", "type": "function", "function": each} for i, each in enumerate(functions)]
    turns = (_turn("user", _USER), {"role": "assistant", "content": content, "tool_calls": calls})
    results = [{"role": "tool", "tool_call_id": each["id"], "content": _RESULT} for each in calls]
    for conversation in ((*turns, *results), turns):  # some show calls only if results follow
        for tools in (None, [_TOOL]):
            if shown := template(*conversation, tools=tools):
                return shown
    return ""


def _reasoning(template: _Probe) -> Reasoning | None:
    opening = template(_turn("user", _USER)).partition(_USER)[2].rstrip()
    switch = next((name for name in _SWITCHES if name in template.variables), None)
    for name, shown in _REASONING_SHOWN:
        if all(mark in template.source for mark in shown):
            start, end = REASONING_MARKS[name]
            around = ANSWER_MARKS.get(name, ("", ""))
            return Reasoning(start, end, opened=opening.endswith(start), switch=switch, around=around)
    return None
