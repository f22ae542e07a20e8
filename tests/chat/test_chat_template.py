"""Chat templates against transformers' rendering, and what they must refuse."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from aphrodite.chat.jinja import RESERVED_NAMES, JinjaTemplate
from aphrodite.errors import InvalidRequestError

Messages = list[dict[str, Any]]

# As in the GGUF file of the default model.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml": """\
{% for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "llama3": """\
{%- set ns = namespace(first=true) -%}
{%- for m in messages -%}
{%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' -%}
{%- if loop.index0 == 0 -%}{%- set text = bos_token + text -%}{%- endif -%}
{{ text }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
""",
    "llama3 with tools": """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- 'Today: ' + strftime_now('%Y') + '\\n' + system }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- '\\n' }}{{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role not in ['ipython', 'tool'] and 'tool_calls' not in m %}
        {{- '<' + m.role + '>' + (m.content or '') | trim + '</>' }}
    {%- elif 'tool_calls' in m and m.tool_calls | length == 1 %}
        {%- for call in m.tool_calls %}{{- call.function.name ~ ':' ~ call.function.arguments | tojson }}{%- endfor %}
    {%- else %}
        {{- '<tool>' ~ m.content | string ~ '</>' }}
    {%- endif %}
{%- endfor %}
""",
    "mistral": """\
{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}\
{{ m['content'] + eos_token }}{% else %}\
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}""",
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "qwen with macros and thinking": """\
{%- macro show(m, last=false) -%}
    {%- if '</think>' in m.content and not last -%}{{ m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else -%}{{ m.content }}{%- endif -%}
{%- endmacro -%}
{%- if tools %}{{ '# Tools\\n' }}{% for t in tools %}{{ t.function.name ~ '(' ~ t.function.parameters.properties | \
dictsort | map('first') | join(', ') ~ ')\\n' }}{% endfor %}{%- endif %}
{%- for m in messages if m.role != 'tool' %}
{{- '<|' ~ m.role | upper ~ '|>' ~ show(m, loop.last) ~ ('\\n' if not loop.last else '') }}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>' }}{% endif %}
""",
    "parts": """\
{%- for m in messages -%}
{{- m.role ~ ': ' -}}
{%- if m.content is string -%}{{ m.content }}
{%- else -%}{%- for part in m.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}
{%- endif -%}{{ eos_token }}
{%- endfor -%}""",
    "loop controls and generation": """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{% continue %}{% endif %}
{%- if loop.index > 4 %}{% break %}{% endif %}
{% generation %}{{ loop.index ~ '/' ~ loop.length ~ ' ' ~ m.content ~ loop.cycle('a', 'b') }}{% endgeneration %}
{%- endfor %}
{%- if loop is defined %}never{% endif %}""",
    "system from documents": """\
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}
{{- system | join(' / ') | default('none', true) -}}
{%- if documents -%}{%- for d in documents -%}
{{ '\\n[' ~ loop.index ~ '] ' ~ d.title ~ ': ' ~ d.text }}{%- endfor -%}{%- endif -%}
{%- for m in messages | rejectattr('role', 'equalto', 'system') -%}
{{- '\\n' ~ m.role.capitalize() ~ '> ' ~ m.content.strip().replace('\\n', ' ') -}}
{%- if not loop.last and loop.nextitem.role == m.role -%}{{- ' (again)' -}}{%- endif -%}
{%- endfor -%}""",
    "recursive and formatted": """\
{%- for m in messages recursive -%}
{{- '%s=%s;' % (m.role, m.content) -}}{{- '{0:>4}|'.format(loop.depth) -}}
{%- if m.more is defined -%}{{- loop(m.more) -}}{%- endif -%}
{%- else -%}{{- 'nobody' -}}
{%- endfor -%}""",
    "namespaces and arithmetic": """\
{%- set ns = namespace(n=0, names=[], seen={}) -%}
{%- for m in messages -%}
{%- set ns.n = ns.n + m.content | length * 2 - 1 -%}{%- set ns.names = ns.names + [m.role] -%}
{%- set ns.seen = dict(ns.seen, **{m.role: loop.index}) -%}
{%- endfor -%}
{{- ns.n ~ ' ' ~ ns.names | unique | list ~ ' ' ~ ns.seen.items() | list -}}
{{- ' ' ~ (ns.n ** 2 % 7) ~ ns.names[::-1] -}}""",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'It\'s <warm> & "nice" – 温度',
            "parameters": {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"type": "string"}}},
        },
    }
]
CHATS: list[Messages] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hi 👩‍👩‍👧‍👦"}],
    [
        {"role": "user", "content": "a\nb  "},
        {"role": "assistant", "content": "<think>hm</think>\nYes. "},
        {"role": "user", "content": "<|im_end|> {{ 7 * 7 }} {% raw %}"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"temp": 21}'},
        {"role": "assistant", "content": "21 °C"},
    ],
    [{"role": "user", "content": str(i), "more": [{"role": "x", "content": "y"}]} for i in range(7)],
    [],
]


def theirs(source: str, messages: Messages, **options: Any) -> str:
    """transformers' rendering."""
    from transformers.utils.chat_template_utils import render_jinja_template

    extra = {"bos_token": "<s>", "eos_token": "</s>"}
    return str(render_jinja_template([messages], chat_template=source, **extra, **options)[0][0])


def ours(source: str, messages: Messages, **options: Any) -> str:
    return JinjaTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(name: str, chat: int) -> None:
    source, messages = TEMPLATES[name], CHATS[chat]
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": TOOLS, "documents": [{"title": "T", "text": "x"}]},
    ):
        try:
            expected = theirs(source, messages, **options)
        except Exception:
            with pytest.raises(InvalidRequestError):
                ours(source, messages, **options)
        else:
            assert ours(source, messages, **options) == expected


def test_most_of_the_comparisons_render_at_all() -> None:
    rendered = 0
    for source in TEMPLATES.values():
        for messages in CHATS:
            try:
                rendered += bool(ours(source, messages) or not messages)
            except InvalidRequestError:
                continue
    assert rendered > 0.7 * len(TEMPLATES) * len(CHATS)


@pytest.mark.parametrize("name", ["smollm2", "chatml", "llama3", "mistral", "gemma", "parts"])
@pytest.mark.parametrize("text", ["Once upon", "trailing space ", "\n", "two\nlines", "ends with <|im_end|>"])
def test_continuing_a_message_equals_transformers(name: str, text: str) -> None:
    messages = [{"role": "user", "content": "Tell"}, {"role": "assistant", "content": text}]
    expected = theirs(TEMPLATES[name], messages, continue_final_message=True)
    assert ours(TEMPLATES[name], messages, continue_final_message=True) == expected
    assert messages[1]["content"] == text


def test_a_message_that_is_not_shown_cannot_be_continued() -> None:
    messages: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for source in ("{{ messages[0].content }}", "{{ messages[-1].content | upper }}"):
        with pytest.raises(InvalidRequestError, match="cannot be continued"):
            ours(source, messages, continue_final_message=True)
    for messages in ([], [{"role": "assistant", "content": None}]):
        with pytest.raises(InvalidRequestError, match="no text"):
            ours("{{ messages }}", messages, continue_final_message=True)


def test_extra_variables_reach_the_template() -> None:
    source = TEMPLATES["qwen with macros and thinking"]
    extra = {"enable_thinking": False}
    assert ours(source, CHATS[0], extra=extra) == theirs(source, CHATS[0], add_generation_prompt=True, **extra)


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "_private", "not a name", ""])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="reserved") as error:
        ours("x", [], extra={name: 1})
    assert error.value.param == "chat_template_kwargs"


def test_undefined_tokens_are_empty() -> None:
    assert JinjaTemplate("{{ bos_token }}|{{ 'y' if eos_token is defined else 'n' }}").render([]) == "|n"


def test_the_templates_own_refusal_is_the_error() -> None:
    with pytest.raises(InvalidRequestError, match="Conversation roles must alternate"):
        ours(TEMPLATES["mistral"], [{"role": "assistant", "content": "x"}])


def test_a_fault_names_its_line_and_nothing_of_the_machine() -> None:
    with pytest.raises(InvalidRequestError, match=r"line 2: TypeError") as error:
        ours("a\n{{ 1 + none }}", [])
    assert "0x" not in str(error.value)
    with pytest.raises(InvalidRequestError, match="line 3"):
        JinjaTemplate("a\n\n{% if %}")


# --- content ---


def test_parts_are_joined_for_a_template_that_prints_content() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo<|im_end|>" in ours(TEMPLATES["chatml"], [{"role": "user", "content": parts}])


def test_parts_stay_for_a_template_that_loops_over_them() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ours(TEMPLATES["parts"], [{"role": "user", "content": parts}]) == "user: onetwo</s>"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set c = m.content %}{% for p in c | list %}[{{ p.text }}]{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for p in m.content[:] %}[{{ p.text }}]{% endfor %}{% endfor %}",
    ],
)
def test_a_string_becomes_a_part_for_a_template_that_takes_only_parts(source: str) -> None:
    assert ours(source, [{"role": "user", "content": "hi"}]) == "[hi]"


def test_a_loop_over_one_roles_content_does_not_make_parts_of_all() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool_calls' %}{% for c in m.content %}{{ c.name }}{% endfor %}"
        "{% else %}{{ '<' + m.content + '>' }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}]
    assert ours(source, messages) == theirs(source, messages) == "<hi>"


def test_other_parts_are_refused_by_name() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidRequestError, match="image_url") as error:
        ours(TEMPLATES["parts"], [{"role": "user", "content": content}])
    assert error.value.param == "messages[0].content[1]"


def test_only_json_values_are_taken() -> None:
    with pytest.raises(InvalidRequestError, match="PosixPath"):
        ours("x", [{"role": "user", "content": "a", "file": Path("/")}])
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="levels deep"):
        ours("x", [{"role": "user", "content": "a", "deep": deep}])
    with pytest.raises(InvalidRequestError, match="must be an object"):
        ours("x", ["hello"])  # type: ignore[list-item]


# --- safety ---

INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{{ ('{0.__class__.__mro__}' | e).format('') }}",
    "{% autoescape true %}{% set x %}{0.__class__}{% endset %}{{ x.format('') }}{% endautoescape %}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER') }}",
    "{{ joiner.__init__.__globals__['__builtins__'].open('MARKER', 'w') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARKER') }}",
    "{{ self._TemplateReference__context.cycler }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__code__ }}",
    "{% for i in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ dict.fromkeys([1]) }}",
    "{{ 'x'.encode() }}",
    "{% include 'MARKER' %}",
    "{% import 'MARKER' as x %}{{ x }}",
    "{{ [1] | map('attr', '__class__') | list }}",
    "{{ dict.mro() }}",
]


@pytest.mark.parametrize("source", INJECTIONS)
def test_injections_are_refused(source: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    source = source.replace("MARKER", str(marker))
    with pytest.raises(InvalidRequestError):
        ours(source, [{"role": "user", "content": "x"}])
    assert not marker.exists()


@pytest.mark.parametrize("source", [s for s in INJECTIONS if "MARKER" in s or "__class__" in s])
def test_injections_in_messages_are_text(source: str) -> None:
    assert source.strip() in ours(TEMPLATES["chatml"], [{"role": "user", "content": source}])


BOMBS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(20000) %}{% for j in range(20000) %}{% endfor %}{% endfor %}",
    "{% for i in range(20000) %}{% for j in range(20000) if false %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a' * 10000000000 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** 100000 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "{% set x = 'ab' * 400000 %}{{ x.replace('a', x) }}",
    "{% set x = 'ab' * 400000 %}{{ x | replace('a', x) }}",
    "{% set x = 'ab' * 400000 %}{{ x.join(x) }}",
    "{{ range(20000) | join('a' * 100000) }}",
    "{% set x = 'a' * 900000 %}{% for i in range(9) %}{{ x }}{% endfor %}",
    "{% set x = 'a' * 900000 %}{% macro m() %}{% for i in range(999) %}{{ x[1:] }}{% endfor %}{% endmacro %}{{ m() }}",
    "{% set x = 'a' * 900000 %}{{ '%(a)s' * 1000 % {'a': x} }}",
    "{% set x = 'a' * 900000 %}{{ ('{0}' * 1000).format(x) }}",
    "{% set x = 'a' * 900000 %}{% for c in x %}{% set y = x.count('aaaab') %}{% endfor %}",
    "{% set x = '\\n' * 900000 %}{{ x | indent(100000) }}",
    "{{ [1, 2] | tojson(indent=1000000000) }}",
    "{{ [1, 2] | tojson(separators=['a' * 1000, 'b']) }}",
    "{{ [1, 2] | batch(1000000000, 'x') | list }}",
    "{{ 5 | round(-1000000000) }}",
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if a %}" * 500 + "{% endif %}" * 500,
    "{{ x }}" * 12000,
    "a" * 200_000,
]


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_bombs_end_in_an_error(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ours(source, [])


def test_large_honest_conversations_render() -> None:
    long = "word and more words\n" * 200_000
    messages = [{"role": "user", "content": long}, {"role": "assistant", "content": "ok"}] * 2
    assert ours(TEMPLATES["chatml"], messages).count(long) == 2
    many = [{"role": "user", "content": f"message {i}"} for i in range(3000)]
    assert ours(TEMPLATES["parts"], many) == theirs(TEMPLATES["parts"], many)


def test_a_template_that_looks_at_all_messages_before_each_renders_long_chats() -> None:
    source = (
        "{% for m in messages %}{% set ns = namespace(last='') %}{% for j in range(loop.index0) %}"
        "{% if messages[j].role != 'tool' %}{% set ns.last = messages[j].role %}{% endif %}{% endfor %}"
        "{{ ns.last ~ '<' ~ m.role ~ '>' ~ m.content }}{% endfor %}"
    )
    chat = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(800)]
    assert ours(source, chat).endswith("user<assistant>799")


def test_templates_render_in_threads_at_once_with_budgets_of_their_own() -> None:
    template = JinjaTemplate(TEMPLATES["chatml"])
    bomb = JinjaTemplate(BOMBS[1])
    results: dict[int, str] = {}

    def work(i: int) -> None:
        try:
            results[i] = (bomb if i % 4 == 0 else template).render([{"role": "user", "content": str(i)}])
        except InvalidRequestError:
            results[i] = "refused"

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(12):
        assert results[i] == "refused" if i % 4 == 0 else f"user\n{i}<|im_end|>" in results[i]
