"""Chat templates by name, for checkpoints without one or with a wrong one, and where a template comes from."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

from aphrodite.chat.limits import MAX_SOURCE_CHARS
from aphrodite.chat.template import ChatTemplate
from aphrodite.errors import ConfigError, InvalidRequestError, ModelFormatError
from aphrodite.tokenizer.tokenizer import Tokenizer

_CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Mistral has no system role: its text goes before the next message of the user.
_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = ns.system + message.content + '\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '[INST] ' + ns.system + message.content + ' [/INST]' -}}
        {%- set ns.system = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception('the mistral template has the roles system, user and assistant only') -}}
    {%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\\n\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:\\n' + message.content + eos_token + '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('the alpaca template has the roles system, user and assistant only') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

_GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = ns.system + message.content | trim + '\\n\\n' -%}
    {%- elif message.role in ['user', 'assistant'] -%}
        {%- set role = 'model' if message.role == 'assistant' else 'user' -%}
        {{- '<start_of_turn>' + role + '\\n' + ns.system + message.content | trim + '<end_of_turn>\\n' -}}
        {%- set ns.system = '' -%}
    {%- else -%}
        {{- raise_exception('the gemma template has the roles system, user and assistant only') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""

TEMPLATES: Final = {"chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL, "alpaca": _ALPACA, "gemma": _GEMMA}


def load_chat_template(name_or_path: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template to use with a model.

    Args:
        name_or_path: a name from `TEMPLATES`, the name of one of the checkpoint's own templates, or the path of a
            file; None: the checkpoint's default template.

    Returns:
        The template, or None where the checkpoint has none and none was asked for.

    Raises:
        ConfigError: there is no such template or file.
        ModelFormatError: the template is damaged, or too long or too complex to be used.
    """
    source = tokenizer.chat_template if name_or_path is None else _find(name_or_path, tokenizer)
    if source is None:
        return None
    tokens = {
        name: None if token_id is None else tokenizer.token_text(token_id)
        for name, token_id in (("bos_token", tokenizer.bos_token_id), ("eos_token", tokenizer.eos_token_id))
    }
    try:
        return ChatTemplate(source, **tokens)
    except InvalidRequestError as error:
        raise ModelFormatError(f"{error} Choose another with --chat-template ({_names()}, or a file).") from None


def _find(name_or_path: str, tokenizer: Tokenizer) -> str:
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    if name_or_path in tokenizer.chat_templates:
        return tokenizer.chat_templates[name_or_path]
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, TEMPLATES)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--chat-template {name_or_path}: no built-in template ({_names()}) and no file has this name.{hint}"
        )
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_SOURCE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: the file cannot be read as text ({error}).") from None


def _names() -> str:
    return ", ".join(TEMPLATES)
