"""The library of chat templates: one row each, in the order in which a checkpoint without a template is compared.

The templates themselves lie in `templates/`, one Jinja file a format, written from what the models' authors publish of
their formats; rows share a file where models share a format. A row says how its models are recognised: special tokens
that the tokenizer must all have, a pattern in the model's name, and the family of its architecture. What a template
can do (tools, reasoning, stops that are control tokens) is read off the template itself (`aphrodite.chat.traits`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Final

from aphrodite.chat.traits import TemplateTraits, describe_template


@dataclass(frozen=True)
class LibraryTemplate:
    """A named format.

    Attributes:
        name: what `--chat-template` takes.
        help: whose format it is.
        file: its file below `templates/`, without the ending.
        aliases: other names.
        stop: texts that end an answer where the format has no control tokens for it.
        tokens: special tokens of the format; a tokenizer without all of them cannot have been made for it.
        pattern: regular expression, found (in any case) in the names of models of this format.
        families: architectures whose chat models have this format when nothing else is known.
        byte_level: recognised by its tokens only where the vocabulary is byte-level (or only where it is not).
        shares_tokens: another format has the same tokens and is the better guess where neither name nor family speaks.
    """

    name: str
    help: str
    file: str
    aliases: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    pattern: str | None = None
    families: tuple[str, ...] = ()
    byte_level: bool | None = None
    shares_tokens: bool = False

    @cached_property
    def source(self) -> str:
        """The Jinja template."""
        file = resources.files("aphrodite.chat") / "templates" / f"{self.file}.jinja"
        return file.read_text(encoding="utf-8")

    @cached_property
    def traits(self) -> TemplateTraits:
        """What it can do."""
        return describe_template(self.source)

    @property
    def all_stops(self) -> tuple[str, ...]:
        """Everything that ends an answer, beside the end-of-sequence token."""
        return tuple(dict.fromkeys((*self.traits.stop, *self.stop)))

    def found_in(self, name: str) -> str | None:
        """The part of a model's name that says that it has this format, or None."""
        found = re.search(self.pattern, name, re.IGNORECASE) if self.pattern is not None else None
        return found.group() if found is not None else None


_CHATML = ("<|im_start|>", "<|im_end|>")
_MISTRAL = ("[INST]", "[/INST]")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")

# Formats of fine-tunes come before those of their base models, and those with more tokens before those with fewer.
# fmt: off
_ROWS: Final = (
    LibraryTemplate(
        "phi-4", "Phi 4 and Phi 4 reasoning", "phi-4", ("phi4",), tokens=(*_CHATML, "<|im_sep|>"), pattern=r"phi-?4"
    ),
    LibraryTemplate(
        "qwen-3", "Qwen 3 with its reasoning mode", "qwen-3", ("qwen3",), tokens=(*_CHATML, "<think>", "</think>"),
        pattern=r"qwen-?3(?!\.5)", families=("qwen3", "qwen3_moe"),
    ),
    LibraryTemplate(
        "qwen", "Qwen 2.5, with its own system message where none is given", "qwen",
        ("qwen2.5", "qwen-2.5", "qwen2", "qwen-2"), tokens=_CHATML, pattern=r"qwen-?(1\.5|2|2\.5)\b",
        shares_tokens=True,
    ),
    LibraryTemplate(
        "openhermes", "OpenHermes, Nous Hermes 2 and 3 (ChatML)", "chatml", ("hermes", "hermes-2", "hermes-3"),
        tokens=_CHATML, pattern=r"openhermes|hermes-(2|3)", shares_tokens=True,
    ),
    LibraryTemplate(
        "yi", "Yi chat (ChatML)", "chatml", ("yi-chat",), tokens=_CHATML, pattern=r"\byi-(1\.5-)?\d+b",
        shares_tokens=True,
    ),
    LibraryTemplate("internlm", "InternLM 2 and later (ChatML)", "chatml", ("internlm2",), tokens=_CHATML,
                    pattern=r"internlm-?[23]", families=("internlm2",), shares_tokens=True),
    LibraryTemplate(
        "chatml", "ChatML: the most common format of fine-tunes, with tools as Qwen and Hermes have them", "chatml",
        tokens=_CHATML, pattern=r"chat-?ml|dolphin|magnum|smollm", families=("qwen2", "qwen2_moe"),
    ),
    LibraryTemplate(
        "gpt-oss", "gpt-oss (harmony)", "gpt-oss", ("harmony", "gptoss", "openai-harmony"),
        tokens=("<|start|>", "<|message|>", "<|channel|>"), pattern=r"gpt-?oss", families=("gpt_oss",),
    ),
    LibraryTemplate(
        "llama-4", "Llama 4", "llama-4", ("llama4", "llama-4-instruct"),
        tokens=("<|header_start|>", "<|header_end|>", "<|eot|>"), pattern=r"llama-?4",
    ),
    LibraryTemplate(
        "llama-3.1", "Llama 3.1, 3.2 and 3.3, with functions and its preamble of dates", "llama-3.1",
        ("llama3.1", "llama-3.2", "llama3.2", "llama-3.3", "llama3.3"), tokens=(*_LLAMA_3, "<|eom_id|>"),
        pattern=r"llama-?3\.[123].*instruct",
    ),
    LibraryTemplate(
        "llama-3", "Llama 3 and most fine-tunes of Llama 3 to 3.3", "llama-3", ("llama3", "llama-3-instruct"),
        tokens=_LLAMA_3,
    ),
    LibraryTemplate("deepseek-r1", "DeepSeek R1 and its distillations", "deepseek-r1", tokens=_DEEPSEEK,
                    pattern=r"deepseek.*\br1\b", shares_tokens=True),
    LibraryTemplate("deepseek-v3.1", "DeepSeek V3.1 and later, with reasoning on demand", "deepseek-v3.1",
                    ("deepseek-v3.2",), tokens=_DEEPSEEK, pattern=r"deepseek.*v3\.[12]", shares_tokens=True),
    LibraryTemplate("deepseek-v3", "DeepSeek V3", "deepseek-v3", ("deepseek", "deepseek3"), tokens=_DEEPSEEK,
                    families=("deepseek_v3",)),
    LibraryTemplate(
        "deepseek-v2", "DeepSeek LLM, V2 and V2.5", "deepseek-v2", ("deepseek2", "deepseek-v2.5"), stop=("\n\nUser:",),
        tokens=("<｜begin▁of▁sentence｜>",), pattern=r"deepseek.*(v2|llm)", families=("deepseek_v2",),
    ),
    LibraryTemplate(
        "gemma-3", "Gemma 3", "gemma", ("gemma3",), tokens=("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        pattern=r"gemma-?3", families=("gemma3",),
    ),
    LibraryTemplate("gemma-2", "Gemma 2", "gemma", ("gemma2",), tokens=("<start_of_turn>", "<end_of_turn>"),
                    pattern=r"gemma-?2", families=("gemma2",)),
    LibraryTemplate("gemma", "Gemma: a system text stands before the first question", "gemma",
                    tokens=("<start_of_turn>", "<end_of_turn>")),
    LibraryTemplate(
        "phi-4-mini", "Phi 4 mini", "phi-4-mini", ("phi4-mini",), tokens=("<|user|>", "<|end|>", "<|tool_call|>"),
        pattern=r"phi-?4-mini",
    ),
    LibraryTemplate("phi-3", "Phi 3 and 3.5", "phi-3", ("phi3", "phi-3.5"), tokens=("<|user|>", "<|end|>"),
                    pattern=r"phi-?3", families=("phi3",)),
    LibraryTemplate(
        "command-r", "Command R, R+ and Aya", "command-r", ("command-r-plus", "aya"),
        tokens=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), families=("cohere",),
    ),
    LibraryTemplate(
        "glm-4.5", "GLM 4.5 and 4.6, with reasoning and tools", "glm-4.5", ("glm4.5", "glm-4.6"),
        tokens=("[gMASK]", "<sop>", "<|user|>", "<think>"), families=("glm4_moe",),
    ),
    LibraryTemplate("glm-4", "GLM 4", "glm-4", ("glm4", "chatglm4"), tokens=("[gMASK]", "<sop>", "<|user|>"),
                    families=("glm4",)),
    LibraryTemplate("seed-oss", "Seed-OSS", "seed-oss", ("seed", "bytedance-seed"), tokens=("<seed:bos>", "<seed:eos>"),
                    pattern=r"seed-?oss", families=("seed_oss",)),
    LibraryTemplate("kimi-k2", "Kimi K2, with tools", "kimi-k2", ("kimi", "moonshot"),
                    tokens=("<|im_user|>", "<|im_assistant|>", "<|im_middle|>"), pattern=r"kimi-?k2"),
    LibraryTemplate(
        "granite", "Granite 3, with tools and documents", "granite", ("granite-3",),
        tokens=("<|start_of_role|>", "<|end_of_role|>"), families=("granite",),
    ),
    LibraryTemplate(
        "openchat", "OpenChat 3.5", "openchat", tokens=("<|end_of_turn|>",), pattern=r"openchat"
    ),
    LibraryTemplate(
        "mistral-v7-tekken", "Mistral Small 3 and later", "mistral-v7-tekken", ("mistral-small",),
        tokens=(*_MISTRAL, "[SYSTEM_PROMPT]"), byte_level=True,
    ),
    LibraryTemplate(
        "mistral-v7", "Mistral Large 2411", "mistral-v7", ("mistral-large",), tokens=(*_MISTRAL, "[SYSTEM_PROMPT]"),
        byte_level=False,
    ),
    LibraryTemplate(
        "mistral-v3-tekken", "Mistral Nemo", "mistral-v3-tekken", ("mistral-nemo",), tokens=_MISTRAL, byte_level=True
    ),
    LibraryTemplate("mistral-v3", "Mistral 7B v0.3, Small and Large 2407, Mixtral 8x22B", "mistral-v3",
                    ("mistral-v2",), tokens=_MISTRAL, byte_level=False),
    LibraryTemplate("mixtral", "Mixtral 8x7B", "mistral-v1", stop=("[INST]",), pattern=r"mixtral.*instruct",
                    families=("mixtral",)),
    LibraryTemplate(
        "metharme", "Metharme: Pygmalion 2 and many role-play models", "metharme", ("pygmalion", "pyg"),
        stop=("<|user|>",), pattern=r"metharme|pygmalion|\bpyg\b|mythalion",
    ),
    LibraryTemplate(
        "zephyr", "Zephyr", "zephyr", stop=("<|user|>", "<|system|>"), pattern=r"zephyr(?!.*gemma)"
    ),
    LibraryTemplate("stablelm", "StableLM Zephyr", "zephyr", stop=("<|user|>", "<|system|>"),
                    pattern=r"stablelm.*zephyr", families=("stablelm",)),
    LibraryTemplate("falcon-3", "Falcon 3 Instruct", "tulu", ("falcon3",), stop=("<|user|>",),
                    pattern=r"falcon-?3.*instruct"),
    LibraryTemplate("tulu", "Tülu 2 and 3, OLMo 2 Instruct", "tulu", ("olmo-2", "olmo2"), stop=("<|user|>",),
                    pattern=r"\bt(u|ü)lu", families=("olmo2",)),
    LibraryTemplate("solar", "SOLAR Instruct and other `### User:` models", "solar", stop=("### User:",),
                    pattern=r"\bsolar(?!-open)|neural-?chat|orca[-_]mini"),
    LibraryTemplate("koala", "Koala", "koala", stop=("USER:",), pattern=r"koala"),
    LibraryTemplate("vicuna", "Vicuna 1.1 and later, WizardLM, Airoboros and others", "vicuna", ("vicuna-1.1",),
                    stop=("USER:",),
                    pattern=r"vicuna|wizardlm|airoboros|goliath|xwin(?!-mlewd)|midnight-?miqu|lzlv|nous-capybara"),
    LibraryTemplate("falcon", "Falcon Instruct", "falcon", stop=("\nUser:",), pattern=r"falcon-(7b|40b|180b)"),
    LibraryTemplate("alpaca", "Alpaca: many merges and writing models of the Llama 1 and 2 time", "alpaca",
                    stop=("### Instruction:", "### Response:"),
                    pattern=r"alpaca|nous-hermes-(llama|13b)|mytho(max|logic)|noromaid|fimbulvetr|chronos"
                    r"|(tie|psy)fighter|mlewd|kunoichi|silicon-maid|toppy"),
    LibraryTemplate("mistral-v1", "Mistral 7B Instruct v0.1 and v0.2", "mistral-v1", ("mistral",), stop=("[INST]",),
                    pattern=r"mistral-7b-instruct-v0\.[12]|miqu", families=("mistral",)),
    LibraryTemplate("llama-2", "Llama 2 Chat", "llama-2", ("llama2", "llama-2-chat"), stop=("[INST]",),
                    pattern=r"llama-?2.*chat"),
    LibraryTemplate("plain", "no model's format: a dialogue in plain text", "plain", ("none",), stop=("\nUser:",)),
)
# fmt: on

TEMPLATES: Final = {row.name: row for row in _ROWS}
PLAIN: Final = TEMPLATES["plain"]


@cache
def template_names() -> dict[str, LibraryTemplate]:
    """All names, aliases among them."""
    return {name: row for row in _ROWS for name in (row.name, *row.aliases)}
