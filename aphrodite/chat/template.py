"""ChatTemplate: from a conversation to the text of a prompt, whatever the template takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from aphrodite.chat import limits
from aphrodite.chat.content import part_texts
from aphrodite.chat.conversation import (
    adaptations,
    system_texts,
    with_arguments,
    with_contents,
    with_names,
    with_thoughts,
)
from aphrodite.chat.jinja import JinjaTemplate, TemplateRefusedError
from aphrodite.chat.tools.history import one_call_a_turn, with_ids, without_words, words_apart
from aphrodite.chat.tools.instruction import (
    has_calls,
    with_deepseek_instruction,
    with_instruction,
    with_spoken_calls,
    without_calls,
)
from aphrodite.chat.traits import Reasoning, TemplateTraits, describe_template
from aphrodite.errors import InvalidRequestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a rendering is asked for beside the messages."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    extra: Mapping[str, Any]
    deadline: float

    def render(self, template: JinjaTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
        return template.render(
            messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            tools=self.tools,
            documents=self.documents,
            extra=self.extra,
            deadline=self.deadline,
        )


class ChatTemplate:
    """A model's chat template: what `apply_chat_template` would render, and conversations that it would refuse.

    Where the template refuses a conversation or leaves a system message out, the conversation is changed as little as
    it takes (`aphrodite.chat.conversation`) and the log says so, once for each kind of change. Names of speakers go
    before their texts where the template does not show them. An answer to continue is put behind the opening of the
    assistant's turn where the template does not show it as it is.

    Args:
        source: the template.
        bos_token, eos_token: texts of the tokenizer's tokens; None: undefined in the template.
        tool_use, rag: templates that take its place for requests with tools, or with documents.
        name: what the log calls it.
        stop: texts that end an answer, beside those that the template shows (`TemplateTraits.stop`).

    Raises:
        InvalidRequestError: a source is not a template, or is too long or too complex.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        tool_use: str | None = None,
        rag: str | None = None,
        name: str = "the chat template",
        stop: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.name = name
        self._template = JinjaTemplate(source, bos_token=bos_token, eos_token=eos_token)
        self._tool_use, self._rag = (
            None if other is None else JinjaTemplate(other, bos_token=bos_token, eos_token=eos_token)
            for other in (tool_use, rag)
        )
        self._stop = tuple(stop)
        self._logged: set[str] = set()

    @cached_property
    def traits(self) -> TemplateTraits:
        """What it can do; tools and documents by the templates that serve them."""
        traits = describe_template(self.source)
        if self._tool_use is not None:
            described = describe_template(self._tool_use.source)
            traits = replace(traits, tool_format=described.tool_format, call_format=described.call_format)
        if self._rag is not None:
            traits = replace(traits, documents=describe_template(self._rag.source).documents)
        return replace(traits, stop=tuple(dict.fromkeys((*traits.stop, *self._stop))))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Takes at most the processor time of `limits.deadline`, and holds the interpreter lock in
        short stretches only, so it may run in a thread beside others.

        Args:
            messages: JSON objects with `role` and `content` (a string, or a list of text parts), and perhaps `name`.
            add_generation_prompt: end with what begins the assistant's answer.
            continue_final_message: end inside the last message, which the answer then continues;
                `add_generation_prompt` is then without effect.
            tools: function descriptions as OpenAI's API has them. Where the template knows none, the system message
                tells of them.
            documents: objects with what the template shows of a document, usually `title` and `text`.
            extra: more variables for the template. `enable_thinking` also reaches a template that calls it `thinking`.

        Raises:
            InvalidRequestError: no form of the conversation suits the template, it failed or exceeded a limit; it
                shows no documents where some were given; a name in `extra` is reserved; or there is nothing
                to continue.
        """
        self._check_use(documents)
        messages = list(messages)
        if all(isinstance(message, Mapping) for message in messages):  # else the rendering says what is wrong
            messages = self._normalised(messages, continue_final_message)
        messages, tools = self._told_in_words(messages, tools)
        template = self._template_for(tools, documents)
        request = _Request(
            add_generation_prompt,
            continue_final_message,
            tools or None,
            documents or None,
            self._variables(extra or {}),
            limits.deadline(len(messages)),
        )
        if all(isinstance(message, Mapping) for message in messages):
            return self._with_words_shown(template, self._prepared(template, messages), request)
        return request.render(template, messages)

    def _normalised(self, messages: list[Mapping[str, Any]], continued: bool) -> list[Mapping[str, Any]]:
        """The conversation with a content in every turn, but for one to continue, and ids that the model knows."""
        last = messages[-1:] if continued else []
        return list(with_ids([*with_contents(messages[: len(messages) - len(last)]), *last], self.traits.tool_format))

    def _with_words_shown(self, template: JinjaTemplate, messages: list[Mapping[str, Any]], request: _Request) -> str:
        """Render the conversation, with a turn for what is said beside calls where the template shows either."""
        traits = describe_template(template.source)
        if traits.calls and not traits.calls_with_words:
            apart: list[Mapping[str, Any]] = list(words_apart(messages, None if traits.calls_alone else ""))
            try:
                return self._fit(template, apart, request)
            except TemplateRefusedError as refusal:
                if len(apart) == len(messages):
                    raise
                self._log_once("what was said beside calls was left out", refusal)
            messages = list(without_words(messages, None if traits.calls_alone else ""))
        return self._fit(template, messages, request)

    def _told_in_words(
        self, messages: list[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]:
        """The conversation, and the tools for the template: none for one that knows none. There texts tell of tools,
        calls and results, also where a request offers no tools any more."""
        well_formed = all(isinstance(message, Mapping) for message in messages)  # else the rendering says what is wrong
        if not well_formed or not (tools or has_calls(messages)):
            return messages, tools
        if self.traits.tool_format is not None:
            return self._with_calls_shown(messages, tools), tools
        if tools and self.traits.call_format == "deepseek":
            self._log_once("tools are described in the system message, DeepSeek's way", "it shows calls, and no tools")
            return list(with_deepseek_instruction(messages, tools, fenced="```json" in self.source)), None
        if tools:
            self._log_once("tools are described in the system message", "it does not tell the model of tools")
            return list(with_instruction(messages, tools)), None
        if self.traits.calls:
            return messages, None
        self._log_once("calls and results became texts", "it does not show calls")
        return list(without_calls(messages)), None

    def _with_calls_shown(self, messages: list[Mapping[str, Any]], tools: Any) -> list[Mapping[str, Any]]:
        """The conversation, with earlier calls as texts for a template that tells of tools and leaves calls out."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        if describe_template(self._template_for(tools, None).source).calls:
            return messages
        self._log_once("calls became texts", "it does not show calls")
        return list(with_spoken_calls(messages, self.traits.tool_format))

    def _check_use(self, documents: Any) -> None:
        if documents and not self.traits.documents:
            raise InvalidRequestError(
                f"documents: {self.name} does not show documents; put them into the messages.", param="documents"
            )

    def _template_for(self, tools: Any, documents: Any) -> JinjaTemplate:
        if tools and self._tool_use is not None:
            return self._tool_use
        if documents and self._rag is not None:
            return self._rag
        return self._template

    def _variables(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """`extra`, with the common name of the reasoning switch under the template's own too."""
        if "enable_thinking" not in extra:
            return extra
        reasoning = self.traits.reasoning
        if reasoning is None or reasoning.switch is None or reasoning.switch in extra:
            return extra
        return {**extra, reasoning.switch: extra["enable_thinking"]}

    def _prepared(self, template: JinjaTemplate, messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Names, thoughts and the arguments of calls as the template takes them; free where there are none."""
        prepared: list[Mapping[str, Any]] = list(with_thoughts(messages))
        if any(message.get("name") for message in messages) and not describe_template(template.source).names:
            prepared = list(with_names(prepared))
        if any(message.get("tool_calls") for message in messages):
            traits = describe_template(template.source)
            prepared = list(with_arguments(prepared, as_text=traits.arguments_as_text))
            if traits.calls and not traits.several_calls:
                prepared = list(one_call_a_turn(prepared))
        return prepared

    def _fit(self, template: JinjaTemplate, messages: list[Mapping[str, Any]], request: _Request) -> str:
        """Render the conversation, or the least changed form of it that the template takes and shows in full."""
        begun = self._begun_with_thought(template, messages, request) if request.continue_final_message else None
        if begun is not None:
            return begun
        text, refusal = _attempt(template, messages, request)
        needed = system_texts(messages)
        incomplete: tuple[str, str] | None = None if text is None else ("", text)
        if text is not None and all(part in text for part in needed):
            return text
        for what, changed in adaptations(messages):
            text, _ = _attempt(template, changed, request)
            if text is not None and all(part in text for part in needed):
                self._log_once(what, refusal)
                return text
            if text is not None and incomplete is None:
                incomplete = (what, text)
        if incomplete is not None:  # no form shows all; a template may also change texts
            what, text = incomplete
            if what:
                self._log_once(what, refusal)
            return text
        if request.continue_final_message:
            forms: list[Sequence[Mapping[str, Any]]] = [messages, *(changed for _, changed in adaptations(messages))]
            for form in forms:
                text = _behind_opening(template, form, request, self.traits.reasoning)
                if text is not None:
                    self._log_once("the answer to continue was put behind the opening of the assistant's turn", refusal)
                    return text
        raise refusal or TemplateRefusedError("The chat template refuses these messages.", param="messages")

    def _begun_with_thought(
        self, template: JinjaTemplate, messages: Sequence[Mapping[str, Any]], request: _Request
    ) -> str | None:
        """The prompt of an answer that is begun with reasoning; None for every other answer.

        Templates take the marks in such a text for the answer's and put others, of an empty reasoning, before them.
        """
        reasoning, text = self.traits.reasoning, _last_text(messages)
        if reasoning is None or text is None or not reasoning.begins(text):
            return None
        on = {} if reasoning.switch is None else {reasoning.switch: True}
        request = replace(request, extra={**request.extra, **on})
        for form in (messages, *(changed for _, changed in adaptations(messages))):
            begun = _behind_opening(template, form, request, reasoning)
            if begun is not None:
                return begun
        return None

    def _log_once(self, what: str, refusal: TemplateRefusedError | str | None) -> None:
        if what in self._logged:
            return
        self._logged.add(what)
        why = "it leaves system messages out" if refusal is None else str(refusal)
        logger.info("%s does not take every conversation as it comes: %s (%s)", self.name, what, why)


def _attempt(
    template: JinjaTemplate, messages: Sequence[Mapping[str, Any]], request: _Request
) -> tuple[str | None, TemplateRefusedError | None]:
    """The rendered conversation, or why the template refuses it."""
    try:
        return request.render(template, messages), None
    except TemplateRefusedError as error:
        return None, error


def _behind_opening(
    template: JinjaTemplate, messages: Sequence[Mapping[str, Any]], request: _Request, reasoning: Reasoning | None
) -> str | None:
    """The conversation before the answer to continue, the opening of that answer, and its text as it is.

    None where the template refuses that too, or shows no opening: a template without one has its answers begin where
    the user's turn ends.
    """
    text = _last_text(messages)
    opening = replace(request, continue_final_message=False, add_generation_prompt=True)
    opened, _ = _attempt(template, messages[:-1], opening)
    closed, _ = _attempt(template, messages[:-1], replace(opening, add_generation_prompt=False))
    if opened is None or text is None:
        return None
    question = _last_text(messages[:-1])
    asked = question is not None and messages[-2].get("role") == "user" and question.strip() in opened
    if opened == closed and not asked:
        return None
    return opened + text if reasoning is None else reasoning.join(opened, text)


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of the last message, parts joined by line ends; None if it has no content."""
    content = messages[-1].get("content") if messages else None
    return None if content is None or content == [] else "\n".join(part_texts(content))
