"""How byte-level BPE vocabularies cut a text into words before merging, by the name in `tokenizer.ggml.pre`.

A GGUF file holds only the name. The patterns are those of the tokenizer.json that each name's models were
published with; merges were learned on words cut this way, so a wrong pattern costs quality silently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str) -> str:
    """OpenAI's cl100k pattern; models differ in how many digits make a word."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _o200k(digits: str, contractions: str) -> str:
    """OpenAI's o200k pattern: words break where lower case turns to upper case."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{contractions}|{lead}{_UPPER}+{_LOWER}*{contractions}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
_WORDS = " ?[^(\\s|.,!?…。，、।۔،)]+"  # of Poro and Viking
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# Escapes where a letter would change under Unicode normalization of this file.
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅ"
    r"Ὀ-Ὅὐ-ὗὙὛὝ\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    r"\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-\u212dℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    r"Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"


def _kimi() -> str:
    """Kimi's variety of o200k: Chinese characters are apart from other letters."""
    lead, ends = r"[^\r\n\p{L}\p{N}]?", _CONTRACTIONS + "?"
    upper, lower = (letters[:-1] + r"&&[^\p{Han}]]" for letters in (_UPPER, _LOWER))
    return (
        rf"\p{{Han}}+|{lead}{upper}*{lower}+{ends}|{lead}{upper}+{lower}*{ends}"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _falcon() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            _gpt2(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def _default() -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does for a file without a name, or with the name `default`."""
    return _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


def _deepseek_llm() -> pre_tokenizers.PreTokenizer:
    marks = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
    return _split(r"[\r\n]", _DEEPSEEK_LETTERS, marks, r"\s+$", _DEEPSEEK_CJK, r"\p{N}")


def _deepseek_coder() -> pre_tokenizers.PreTokenizer:
    return _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")


def _youtu() -> pre_tokenizers.PreTokenizer:
    scripts = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
    return _split(scripts, _o200k("", _CONTRACTIONS + "?"))


def _deepseek_v3() -> pre_tokenizers.PreTokenizer:
    return _split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizerKind:
    """One way to cut words, and what else the name implies for its models.

    Attributes:
        nfc: text is first normalized to composed characters.
        ignore_merges: a word that is in the vocabulary is one token whatever the merges say.
        add_bos: the file's default where it does not say whether bos comes first.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        """The text normalizer of these models, if they have one."""
        return normalizers.NFC() if self.nfc else None


DEFAULT_KIND: Final = PreTokenizerKind(build=_default)
_LLAMA3 = PreTokenizerKind(build=lambda: _split(_cl100k("{1,3}")), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizerKind(build=lambda: _split(_cl100k("{1,3}")))
_QWEN2 = PreTokenizerKind(build=lambda: _split(_cl100k("")), nfc=True)
_O200K = PreTokenizerKind(build=lambda: _split(_o200k("{1,3}", _CONTRACTIONS + "?")))
_TEKKEN = PreTokenizerKind(build=lambda: _split(_o200k("", "")), ignore_merges=True, add_bos=True)
_GPT2_KIND = PreTokenizerKind(build=_gpt2)
_GPT2_NFC = PreTokenizerKind(build=_gpt2, nfc=True)
_DIGITS = PreTokenizerKind(build=_digits_gpt2)
_DEEPSEEK_V3_KIND = PreTokenizerKind(build=_deepseek_v3)
_SINGLE_DIGITS = PreTokenizerKind(build=lambda: _split(_cl100k("")))
_BAILING_KIND = PreTokenizerKind(build=lambda: _split(_BAILING))
_TINY_AYA = PreTokenizerKind(build=lambda: _split(r"\d{1,3}(?=(?:\d{3})*\b)", _o200k("{1,3}", _CONTRACTIONS + "?")))

PRE_TOKENIZERS: Final[dict[str, PreTokenizerKind]] = {
    "default": DEFAULT_KIND,
    "gpt-2": _GPT2_KIND,
    "phi-2": _GPT2_KIND,
    "jais": _GPT2_KIND,
    "exaone4": _GPT2_KIND,
    "trillion": _GPT2_KIND,
    "gigachat": _GPT2_KIND,
    "mellum": _GPT2_KIND,
    "a.x-4.0": _GPT2_KIND,
    "granite-docling": _GPT2_KIND,
    "olmo": _GPT2_NFC,
    "mpt": _GPT2_NFC,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "mellum2": _DIGITS,
    "command-r": PreTokenizerKind(build=_digits_gpt2, nfc=True),
    "falcon": PreTokenizerKind(build=_falcon),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "lfm2": _LLAMA3,
    "jina-v5-nano": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "kormo": _QWEN2,
    "megrez": _QWEN2,
    "f2llmv2": _QWEN2,
    "stablelm2": _SINGLE_DIGITS,
    "hunyuan": _SINGLE_DIGITS,
    "solar-open": _SINGLE_DIGITS,
    "grok-2": _SINGLE_DIGITS,
    "minicpm5": PreTokenizerKind(build=lambda: _split(r"\p{N}{1,3}", _cl100k("+")), ignore_merges=True),
    "seed-coder": PreTokenizerKind(build=lambda: _split(_SEED)),
    "bailingmoe": _BAILING_KIND,
    "bailingmoe2": _BAILING_KIND,
    "llada-moe": _BAILING_KIND,
    "poro-chat": PreTokenizerKind(build=lambda: _split(_WORDS)),
    "viking": PreTokenizerKind(build=lambda: _split(_WORDS, r"\p{N}")),
    "qwen35": PreTokenizerKind(build=lambda: _split(_QWEN35), nfc=True),
    "gpt-4o": _O200K,
    "gpt-oss": _O200K,
    "llama4": _O200K,
    "kanana2": _O200K,
    "minimax-m2": _O200K,
    "talkie": _O200K,
    "tiny_aya": _TINY_AYA,
    "cohere2moe": _TINY_AYA,
    "kimi-k2": PreTokenizerKind(build=lambda: _split(_kimi()), ignore_merges=True),
    "youtu": PreTokenizerKind(build=_youtu, ignore_merges=True),
    "tekken": _TEKKEN,
    "deepseek-llm": PreTokenizerKind(build=_deepseek_llm),
    "deepseek-coder": PreTokenizerKind(build=_deepseek_coder),
    "deepseek-v3": _DEEPSEEK_V3_KIND,
    "hunyuan-dense": _DEEPSEEK_V3_KIND,
    "joyai-llm": _DEEPSEEK_V3_KIND,
}

# Tokens, and the least size of a vocabulary, by which the kind shows where a file does not name one it knows.
_SIGNATURES: Final[tuple[tuple[str, tuple[str, ...], int], ...]] = (
    ("llama-bpe", ("<|begin_of_text|>", "<|eot_id|>"), 128_000),
    ("qwen2", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), 150_000),
    ("tekken", ("[INST]", "[/INST]", "[TOOL_CALLS]"), 130_000),
    ("command-r", ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), 250_000),
    ("deepseek-v3", ("<｜begin▁of▁sentence｜>", "<｜Assistant｜>"), 128_000),
    ("deepseek-llm", ("<｜begin▁of▁sentence｜>",), 100_000),
    ("deepseek-coder", ("<｜begin▁of▁sentence｜>", "<｜fim▁begin｜>"), 32_000),
    ("glm4", ("[gMASK]", "<|assistant|>", "<|user|>"), 150_000),
)


def kind_of_tokens(tokens: Collection[str]) -> str | None:
    """The name of the kind that a vocabulary is known to have, None where that does not show."""
    for name, marks, size in _SIGNATURES:
        if len(tokens) >= size and all(mark in tokens for mark in marks):
            return name
    return None
