"""One Jinja template: from a conversation to text, exactly as the template says, under the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final

from jinja2 import meta
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from aphrodite.chat import limits
from aphrodite.chat.content import conform, detect_form, measure
from aphrodite.chat.environment import ENVIRONMENT, TemplateRaisedError, compile_template, parse_template
from aphrodite.errors import InvalidRequestError

# Stands after the text to continue, so that everything which a template puts there can be cut away. The space
# at its end shows whether the template strips messages.
_CONTINUE_MARK: Final = "\ue000CONTINUE\ue001 "

_TRIAL: Final = "\ue000TRIAL\ue001"

# Names under which templates look for tools where they do not read `tools`.
TOOL_VARIABLES: Final = ("xml_tools", "custom_tools", "available_tools")

RESERVED_NAMES: Final = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
        "chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "self", "loop", "context", "caller",
        "varargs", "kwargs",
    }
    | ENVIRONMENT.globals.keys()
)  # fmt: skip


class TemplateRefusedError(InvalidRequestError):
    """The template itself does not take such a conversation, or fails on it; another form of it may do."""


class JinjaTemplate:
    """A compiled chat template (Hugging Face's dialect of Jinja), safe to render for anybody.

    What a template refuses is refused; `ChatTemplate` fits conversations to it.

    Args:
        source: the template.
        bos_token, eos_token: texts of the tokenizer's tokens; None: undefined in the template.

    Attributes:
        variables: names that the template reads and does not set itself.

    Raises:
        InvalidRequestError: `source` is not a template, or is too long or too complex.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        self.source = source
        self._tokens = {
            name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None
        }
        try:
            tree = parse_template(source)
            self._form = detect_form(tree)
            self.variables = frozenset(meta.find_undeclared_variables(tree)) - ENVIRONMENT.globals.keys()
            self._template = compile_template(tree)
        except TemplateSyntaxError as error:
            raise _invalid(f"line {error.lineno}: {error.message}") from None
        except (TemplateError, SyntaxError, ValueError, OverflowError) as error:
            raise _invalid(str(error)) from None
        except (RecursionError, MemoryError):
            raise _invalid("it is nested too deeply") from None
        if not self._form.strings and self._shows_strings():
            self._form = replace(self._form, strings=True)

    def _shows_strings(self) -> bool:
        """Whether a text shows as it is, be it that some roles' contents are looped over."""
        question = {"role": "user", "content": _TRIAL}
        try:
            return _TRIAL in self._run({**self._tokens, "messages": [question], "add_generation_prompt": True}, None)
        except InvalidRequestError:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        deadline: float | None = None,
    ) -> str:
        """The prompt's text. Takes at most the processor time of `limits.deadline`, and holds the interpreter lock in
        short stretches only, so it may run in a thread beside others.

        Args:
            messages: JSON objects with `role` and `content` (a string, or a list of text parts).
            add_generation_prompt: end with what begins the assistant's answer.
            continue_final_message: end inside the last message, which the answer then continues;
                `add_generation_prompt` is then without effect.
            tools, documents: passed to the template; tools under the name that it reads.
            extra: more variables for the template.
            deadline: a `limits.deadline()` that several renderings share; None: one of its own.

        Raises:
            TemplateRefusedError: the template refused the conversation, failed on it, or does not show the message to
                continue.
            InvalidRequestError: it exceeded a limit; a name in `extra` is reserved; or there is nothing to continue.
        """
        variables = self._variables(messages, tools, documents, extra)
        conversation = conform(messages, self._form)
        if continue_final_message:
            return self._render_open(conversation, variables, deadline)
        return self._run(
            {**variables, "messages": conversation, "add_generation_prompt": add_generation_prompt}, deadline
        )

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        extra: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        if not all(isinstance(message, dict) for message in messages):
            raise InvalidRequestError("messages: each message must be an object.", param="messages")
        for name in extra or {}:
            if name in RESERVED_NAMES or not name.isidentifier() or name.startswith("_"):
                raise InvalidRequestError(
                    f"chat_template_kwargs: the name {name!r} is reserved or not a plain name; use another.",
                    param="chat_template_kwargs",
                )
        given = None if tools is None else list(tools)
        others = () if given is None or "tools" in self.variables else self.variables.intersection(TOOL_VARIABLES)
        return {
            **dict.fromkeys(others, given),
            **(extra or {}),
            **self._tokens,
            "tools": given,
            "documents": None if documents is None else list(documents),
        }

    def _render_open(self, messages: list[dict[str, Any]], variables: dict[str, Any], deadline: float | None) -> str:
        """Render without what would end the last message."""
        text = _mark_end(messages)
        rendered = self._run({**variables, "messages": messages, "add_generation_prompt": False}, deadline)
        mark = _CONTINUE_MARK.strip()
        at = rendered.rfind(mark)
        if at < 0 or text.strip() not in rendered:
            raise TemplateRefusedError(
                "continue_final_message: this chat template does not show the last message as it is, so it cannot "
                "be continued.",
                param="continue_final_message",
            )
        before = rendered[:at]
        return before if rendered.startswith(_CONTINUE_MARK, at) else before.rstrip()

    def _run(self, variables: dict[str, Any], deadline: float | None) -> str:
        size = sum(measure(value, name) for name, value in variables.items())
        count = len(variables["messages"])
        budget = limits.Budget(size, count, limits.deadline(count) if deadline is None else deadline)
        restore = limits.use(budget)
        try:
            chunks: list[str] = []
            total = 0
            for chunk in self._template.root_render_func(self._template.new_context(variables)):
                total += len(chunk)
                budget.check_size(total)
                budget.tick()
                chunks.append(chunk)
            return "".join(chunks)
        except TemplateRaisedError as error:
            raise TemplateRefusedError(f"The chat template refuses these messages: {error}", param="messages") from None
        except (limits.LimitError, RecursionError) as error:  # no other form of the conversation helps
            raise InvalidRequestError(self._fault(error), param="messages") from None
        except Exception as error:  # whatever a template's own fault raises is the request's, never the server's
            raise TemplateRefusedError(self._fault(error), param="messages") from None
        finally:
            restore()

    def _fault(self, error: Exception) -> str:
        """What went wrong, for the client."""
        if isinstance(error, RecursionError):
            return "The chat template failed on these messages: it calls itself too deeply."
        line = self._line_of(error.__traceback__)
        where = "" if line is None else f"line {line}: "
        return f"The chat template failed on these messages: {where}{_public_text(error)}."

    def _line_of(self, traceback: TracebackType | None) -> int | None:
        """Line of the template in which an error was raised."""
        line = None
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == "<template>":
                line = self._template.get_corresponding_lineno(traceback.tb_lineno)
            traceback = traceback.tb_next
        return line


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Put the mark after the last message's text; returns that text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return content
    if isinstance(content, list) and content:
        text = str(content[-1]["text"])
        messages[-1]["content"] = [*content[:-1], {"type": "text", "text": text + _CONTINUE_MARK}]
        return text
    raise InvalidRequestError(
        "continue_final_message: the last message has no text to continue.", param="continue_final_message"
    )


def _public_text(error: Exception) -> str:
    """An error's text for the client: template errors say what is wrong, others may show addresses and values."""
    if isinstance(error, TemplateError):
        return str(error)[:500].rstrip(".")
    return type(error).__name__


def _invalid(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The chat template cannot be used: {reason.rstrip('.')}.", param="chat_template")
