"""What is found out about a template, on templates in the manner of published ones."""

from __future__ import annotations

import pytest

from aphrodite.chat.table import TEMPLATES
from aphrodite.chat.template import ChatTemplate
from aphrodite.chat.traits import Reasoning, describe_template

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_system_role_is_one_that_shows() -> None:
    assert describe_template(LOOP).system_role
    assert not describe_template(LOOP.replace("messages", "messages if m.role != 'system'", 1)).system_role
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP
    assert not describe_template(refusing).system_role


@pytest.mark.parametrize(
    ("between", "stop"),
    [
        ("<|im_end|>\n<|im_start|>user\n", ("<|im_end|>", "<|im_start|>")),
        ("<end_of_turn>\n<start_of_turn>user\n", ("<end_of_turn>", "<start_of_turn>")),
        ("</s>[INST] ", ("</s>", "[INST]")),
        ("{{ eos_token }}<|user|>\n", ("<|user|>",)),
        ("<｜end▁of▁sentence｜><｜User｜>", ("<｜end▁of▁sentence｜>", "<｜User｜>")),
        ("<turn|>\n<|turn>user\n", ("<turn|>", "<|turn>")),
        ("<seed:eos><seed:bos>user\n", ("<seed:eos>", "<seed:bos>")),
        ("\n\nUSER: ", ()),
        (" [link] <b> a < b | c > d [X", ()),
    ],
)
def test_stops_are_the_control_tokens_after_an_answer(between: str, stop: tuple[str, ...]) -> None:
    assert describe_template("{% for m in messages %}{{ m.content }}" + between + "{% endfor %}").stop == stop


def test_a_token_that_also_ends_reasoning_is_no_stop() -> None:
    harmony = TEMPLATES["gpt-oss"].traits
    assert harmony.stop == ("<|return|>", "<|call|>")
    source = "{# <|think|> #}{% for m in messages %}<|begin|>{{ m.role }}<|content|>{{ m.content }}<|end|>{% endfor %}"
    assert describe_template(source).stop == ()


@pytest.mark.parametrize(
    ("mark", "tool_format"),
    [
        ("<tool_call>\\n{", "hermes"),
        ("<tool_call>\\n<function=f>\\n<parameter=a>", "qwen3_coder"),
        ("<tool_call>f\\n<arg_key>", "glm"),
        ("<|python_tag|>", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", "deepseek"),
        ("<|START_ACTION|>", "command_r"),
        ("<|tool_call|>", "granite"),
        ("<|channel|>commentary", "gpt_oss"),
        ('<｜DSML｜invoke name="', "deepseek_v32"),
        ("<｜tool_calls_begin｜>", "step3"),
        ("<|im_system|>tool_declare<|im_middle|>", "kimi_k2"),
        ("<|tool_call_begin|><|tool_calls_section_begin|>", "kimi_k2"),
        ("List of tools: <|tool_list_start|>", "lfm2"),
        ("<|tool_call_start|>[", "lfm2"),
        ("<|tool_call>call:f{", "gemma4"),
        ("<start_function_call>call:f{", "functiongemma"),
        ('<minimax:tool_call><parameter name="', "minimax_m2"),
        ("<seed:tool_call><function=f><parameter=", "seed_oss"),
        ("<tool_calls>[", "hunyuan"),
        ("<TOOLCALL>[", "nemotron"),
        ("<|tool|><|/tool|><|tool_call|>", "phi4_mini"),
        ("<|action_start|><|plugin|>", "internlm"),
        ("<|tools_prefix|>[", "apertus"),
        ("<function_calls>", "olmo3"),
        ('<function name="f"><param name="a">', "minicpm5"),
        ("<|function_call|>", "gigachat3"),
        ("List of tools: [", "lfm2"),
        ("<|python_start|>", "llama3"),
        ("<|observation|>", "glm4"),
        ("anything else", "json"),
    ],
)
def test_tool_formats_are_told_by_their_marks(mark: str, tool_format: str) -> None:
    source = "{% if tools %}{{ tools | tojson }}{{ '" + mark + "' }}{% endif %}" + LOOP
    assert describe_template(source).tool_format == tool_format
    assert describe_template("{{ '" + mark + "' }}" + LOOP).tool_format is None  # the model is told of no tools


def test_the_librarys_formats() -> None:
    formats = {name: row.traits.tool_format for name, row in TEMPLATES.items() if row.traits.tool_format}
    assert formats == {
        **dict.fromkeys(("chatml", "openhermes", "yi", "internlm", "qwen", "qwen-3"), "hermes"),
        **dict.fromkeys(("mistral-v3", "mistral-v3-tekken", "mistral-v7", "mistral-v7-tekken"), "mistral"),
        "llama-3.1": "llama3",
        "glm-4.5": "glm",
        "granite": "granite",
        "gpt-oss": "gpt_oss",
        "phi-4-mini": "phi4_mini",
        "kimi-k2": "kimi_k2",
    }
    assert [name for name, row in TEMPLATES.items() if row.traits.documents] == ["granite"]
    assert [name for name, row in TEMPLATES.items() if not row.traits.system_role] == ["koala"]
    assert not any(row.traits.names or row.traits.arguments_as_text for row in TEMPLATES.values())
    assert {name: row.traits.reasoning for name, row in TEMPLATES.items() if row.traits.reasoning} == {
        "qwen-3": Reasoning("<think>", "</think>", opened=False, switch="enable_thinking"),
        "glm-4.5": Reasoning("<think>", "</think>", opened=False, switch="enable_thinking"),
        "deepseek-v3": Reasoning("<think>", "</think>", opened=False, switch=None),
        "deepseek-v3.1": Reasoning("<think>", "</think>", opened=False, switch="thinking"),
        "deepseek-r1": Reasoning("<think>", "</think>", opened=True, switch=None),
        "seed-oss": Reasoning("<seed:think>", "</seed:think>", opened=False, switch=None),
        "gpt-oss": Reasoning("<|channel|>analysis<|message|>", "<|end|>", opened=False, switch=None),
    }


@pytest.mark.parametrize(
    ("marks", "start", "end"),
    [
        ("<think></think>", "<think>", "</think>"),
        ("[THINK] [/THINK]", "[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        ("<seed:think>", "<seed:think>", "</seed:think>"),
        ("<|channel>thought\n<channel|>", "<|channel>thought", "<channel|>"),
        ("<|inner_prefix|>", "<|inner_prefix|>", "<|inner_suffix|>"),
    ],
)
def test_reasoning_marks(marks: str, start: str, end: str) -> None:
    assert describe_template(LOOP + "{# <answer></answer><response></response> #}").reasoning is None
    assert describe_template("{# " + marks + " #}" + LOOP).reasoning == Reasoning(start, end, False, None)
    assert describe_template(LOOP).reasoning is None


@pytest.mark.parametrize(
    ("marks", "around"),
    [
        ("</think><answer></answer>", ("<answer>", "</answer>")),
        ("</think><response></response>", ("<response>", "</response>")),
        ("[BEGIN FINAL RESPONSE] ... [END FINAL RESPONSE]", ("", "[END FINAL RESPONSE]")),
        ("</think><answer>", ("", "")),
    ],
)
def test_marks_around_the_answer(marks: str, around: tuple[str, str]) -> None:
    reasoning = describe_template("{# " + marks + " #}" + LOOP).reasoning
    assert reasoning is not None
    assert reasoning.around == around


def test_a_prompt_may_end_inside_reasoning() -> None:
    source = (
        LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined and not thinking %}"
        "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
    )
    template = ChatTemplate(source)
    reasoning = template.traits.reasoning
    assert reasoning == Reasoning("<think>", "</think>", opened=True, switch="thinking")
    messages = [{"role": "user", "content": "<think>"}]
    assert reasoning.is_open(template.render(messages))
    assert not reasoning.is_open(template.render(messages, extra={"enable_thinking": False}))
    assert not reasoning.is_open(template.render(messages, add_generation_prompt=False))


def test_a_template_that_takes_part_lists_only_is_described_too() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|eot|>{% endfor %}"
    assert describe_template(source).stop == ("<|eot|>",)
    assert describe_template(source).system_role


def test_a_template_that_never_renders_can_nothing() -> None:
    traits = describe_template("{{ raise_exception('no') }}")
    assert (traits.system_role, traits.names, traits.stop, traits.tool_format) == (False, False, (), None)
