"""From a conversation to what the engine is asked, and to what will take its answers apart; for every protocol."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import msgspec

from aphrodite.chat.answer import AnswerFormat, reasoning_format
from aphrodite.chat.content import part_texts
from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.context import ModelContext
from aphrodite.server.errors import invalid
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.rendering import chat_prompt, template_of
from aphrodite.server.openai.tools import ToolUse, alone, behind_reasoning, json_rules, read_tool_use
from aphrodite.server.openai.warnings import budget_warnings
from aphrodite.tokenizer.tokenizer import Tokenizer

_TAIL = 32  # tokens: more than the opening of any answer's reasoning has


class PreparedChat(NamedTuple):
    """A conversation that may be answered.

    Attributes:
        token_ids: the prompt.
        params: what the client asked for, as the prompt and the reader need it.
        reader: takes the answers apart; None: they are just text.
        warnings: what of the request has no effect on this model.
    """

    token_ids: list[int]
    params: SamplingParams
    reader: AnswerReader | None
    warnings: list[str]


async def prepare_chat(fields: ChatFields, params: SamplingParams, context: ModelContext) -> PreparedChat:
    """Render a conversation, and say how its answers are read.

    Raises:
        ApiError, InvalidRequestError: 400, naming the field.
    """
    tools = read_tool_use(fields)
    token_ids, prompted = await chat_prompt(fields, params, context, tools)
    answers = answer_format(fields, context, token_ids, tools)
    bound, answers = with_grammar(prompted, answers, tools, context.engine.tokenizer)
    bound = _with_budget(fields, bound, answers, context)
    warnings = _warnings(fields, params, context)
    if answers.plain:
        return PreparedChat(token_ids, bound, None, warnings)
    reader = AnswerReader(
        answers,
        context.engine.tokenizer,
        token_ids,
        tools=tools,
        show_special=not params.skip_special_tokens,
        include_reasoning=fields.include_reasoning,
    )
    bound = msgspec.structs.replace(bound, skip_special_tokens=False)  # some are marks
    return PreparedChat(token_ids, bound, reader, warnings)


def answer_format(
    fields: ChatFields, context: ModelContext, prompt_token_ids: list[int], tools: ToolUse
) -> AnswerFormat:
    """How the answers to a conversation are marked; see `AnswerFormat`."""
    reasoned = _reasoning_format(fields, context, prompt_token_ids)
    if not tools.tools:
        return reasoned
    if tools.required:  # under a grammar of our own, which is no harmony
        return replace(_without_harmony(reasoned), tool_format="json", schemas=tools.schemas)
    chosen = context.config.tool_parser
    if chosen == "none":
        return reasoned
    tool_format = chosen or template_of(fields, context).traits.call_format
    return replace(reasoned, tool_format=tool_format, schemas=tools.schemas)


def _without_harmony(answers: AnswerFormat) -> AnswerFormat:
    """The format of an answer under a grammar of ours, which is no harmony."""
    return AnswerFormat() if answers.is_harmony else answers


def with_grammar(
    params: SamplingParams, answers: AnswerFormat, tools: ToolUse, tokenizer: Tokenizer
) -> tuple[SamplingParams, AnswerFormat]:
    """`params` with a grammar that knows of calls, and leaves reasoning free where the prompt opened it.

    Calls that are demanded are all of it. Where calls may come and the request says what JSON the answer is, it may be
    either. Where reasoning cannot be left free, the answer is text from its beginning.

    Raises:
        ApiError: 400: the request demands calls, and another form of answer.
    """
    grammar = params.grammar
    if tools.required:
        if grammar is not None:
            raise invalid("tool_choice", "demands calls, and the request another form of answer; send one of them")
        grammar = tools.grammar()
    if grammar is None:
        return params, answers
    rules = json_rules(grammar)
    if rules is not None and answers.tool_format is not None and not tools.required:
        rules = tools.rules_beside(rules, tokenizer)
        grammar, answers = alone(rules), replace(_without_harmony(answers), tool_format="json", schemas=tools.schemas)
    reasoning = answers.reasoning if answers.is_open and not answers.is_harmony else None
    if reasoning is not None and rules is None:
        answers = replace(answers, is_open=False, is_text=True)
    elif reasoning is not None and rules is not None:
        grammar = behind_reasoning(rules, reasoning, tokenizer)
    return msgspec.structs.replace(params, grammar=grammar), answers


def _with_budget(
    fields: ChatFields, params: SamplingParams, answers: AnswerFormat, context: ModelContext
) -> SamplingParams:
    """`params` with the marks that a budget of reasoning needs; without a budget where no reasoning can come.

    An effort of none is a budget of none where the template cannot turn reasoning off.
    """
    budget = params.thinking_token_budget
    if budget is None and fields.reasoning_effort == "none" and not _has_switch(fields, context):
        budget = 0
    if budget is None:
        return params
    free = params.grammar is None or (answers.is_open and not answers.is_harmony)
    marks = answers.marks_of_reasoning if free else None
    return msgspec.structs.replace(params, thinking_token_budget=None if marks is None else budget, reasoning=marks)


def _warnings(fields: ChatFields, params: SamplingParams, context: ModelContext) -> list[str]:
    """What to say of fields about reasoning that this model has no use for."""
    template, effort = template_of(fields, context), fields.reasoning_effort
    marked = reasoning_marks(template.traits, context.config.reasoning_parser) is not None
    told = budget_warnings(params, context, template)
    if effort is not None and template.traits.reasoning is None and not (marked and effort == "none"):
        told.append(f"`reasoning_effort` has no effect: {template.name} says nothing of reasoning.")
    elif effort == "none" and not marked and not _has_switch(fields, context):
        told.append(f"`reasoning_effort` none has no effect: {template.name} cannot turn reasoning off.")
    return told


def _has_switch(fields: ChatFields, context: ModelContext) -> bool:
    """Whether reasoning can be turned off in the prompt, so that none has to be closed."""
    reasoning = template_of(fields, context).traits.reasoning
    return reasoning is not None and reasoning.switch is not None


def _reasoning_format(fields: ChatFields, context: ModelContext, prompt_token_ids: list[int]) -> AnswerFormat:
    reasoning = reasoning_marks(template_of(fields, context).traits, context.config.reasoning_parser)
    begun = "".join(part_texts(fields.messages[-1].get("content"))) if fields.continue_final_message else None
    tail = context.engine.tokenizer.decode(prompt_token_ids[-_TAIL:], skip_special_tokens=False)
    return reasoning_format(reasoning, tail, begun=begun)
