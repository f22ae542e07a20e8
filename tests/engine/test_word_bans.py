"""bad_words reach the engine as token ids."""

from __future__ import annotations

from typing import Any, cast

import pytest

from aphrodite.engine.preparation import tokenize_words
from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer


class Bytes:
    """A tokenizer of bytes, which refuses what is not Unicode."""

    def encode_batch(self, texts: list[str], **_: Any) -> list[list[int]]:
        try:
            return [list(text.encode()) for text in texts]
        except UnicodeEncodeError:
            raise InvalidRequestError("not valid Unicode") from None


TOKENIZER = cast(Tokenizer, Bytes())


def test_words_are_tokenized_with_and_without_a_leading_space() -> None:
    params = SamplingParams(bad_words=(" ab", "ab", " "), bad_words_ids=((7,), (97, 98)))
    ready = tokenize_words(params, TOKENIZER, 256)
    assert ready.bad_words == ()
    assert ready.bad_words_ids == ((7,), (97, 98), (32,), (32, 97, 98), (32, 32))


def test_spellings_beyond_the_models_vocabulary_are_left_out() -> None:
    assert tokenize_words(SamplingParams(bad_words=("a", "é")), TOKENIZER, 128).bad_words_ids == ((97,), (32, 97))


def test_what_is_not_unicode_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        tokenize_words(SamplingParams(bad_words=("\ud800",)), TOKENIZER, 256)
    assert raised.value.param == "bad_words"
