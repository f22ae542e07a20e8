"""Grammars over a model's tokens: what may come next, how an answer goes on, and when it has to end.

llguidance (MIT; https://github.com/guidance-ai/llguidance) reads JSON schemas, regular expressions and rules, and says
which tokens may follow, in tens of microseconds: an Earley parser over lexemes that are derivatives of regular
expressions, walked along a trie of the vocabulary. It is imported when the first grammar comes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.gbnf import lark_of_gbnf
from aphrodite.sampling.grammar_fields import JSON_DEFAULTS
from aphrodite.sampling.table import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from aphrodite.sampling.vocabulary import Vocabulary

# One step of a grammar at its worst costs tens of milliseconds with these (see llguidance's ParserLimits).
_LIMITS: Mapping[str, Any] = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_MAX_COMPILED = 64
_MAX_ERROR = 600  # characters
# What masks of one answer may cost in all, before it ends: they hold up everyone's step.
_SECONDS_AT_FIRST, _SECONDS_PER_TOKEN = 1.0, 0.01

TOO_SLOW = "finding the tokens that it allows takes too long; simplify it"
NO_TOKEN = "it leaves no token to go on with"
NOTHING_FITS = "no text fits it"


class GrammarCompiler:
    """Grammars over one vocabulary, compiled and kept. May be used from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> LLMatcher:
        """The grammar's state before the first token; not to be changed, for it is shared.

        Raises:
            InvalidRequestError: it is not well formed, or beyond a limit; the message is llguidance's.
        """
        key = key_of(grammar)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        matcher = self._compile(grammar)
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher

    def follow(self, grammar: Grammar, num_prompt: int, endings: Sequence[int]) -> GrammarRow:
        """A new answer, whose first token stands at `num_prompt`; see `GrammarRow`."""
        return GrammarRow(self.compile(grammar).deep_copy(), self._vocabulary.size, num_prompt, endings)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        require()
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        try:
            source = _source(llguidance.LLMatcher, grammar)
        except (ValueError, RecursionError) as error:
            raise unusable(grammar, str(error)) from None
        matcher: LLMatcher = llguidance.LLMatcher(self._tables(llguidance), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise unusable(grammar, matcher.get_error())
        return matcher

    def _tables(self, llguidance: Any) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(_Tokens(self._vocabulary))
            return self._tokenizer


def require() -> None:
    """Return if grammars can be used here.

    Raises:
        InvalidRequestError: llguidance is not installed.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise InvalidRequestError(
            "structured output needs the package llguidance, which is not installed here: pip install llguidance",
            param="grammar",
        )


class _Tokens:
    """The vocabulary as llguidance reads it, with one token more: the end of the answer, whatever the model's is."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.size
        self.tokens = [*(vocabulary.token_bytes(token_id) for token_id in range(vocabulary.size)), b"<end>"]
        self.special_token_ids = [*sorted(vocabulary.special_ids), vocabulary.size]

    def __call__(self, text: bytes | str) -> list[int]:
        """How the model spells a text that the grammar forces."""
        data = text.encode() if isinstance(text, str) else text
        return self._vocabulary.encode_inside(data) or self._vocabulary.spell(data)


def _source(matcher: type[LLMatcher], grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import regex_to_lark

    text = grammar.text
    match grammar.kind:
        case "json_object":
            return matcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_DEFAULTS)  # type: ignore[arg-type]
        case "json_schema":
            return matcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS)  # type: ignore[arg-type]
        case "regex":
            # Rust's \d is any digit of Unicode's, which nobody means who writes it.
            return matcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='d')}/")
        case "choice":
            choices = " | ".join(json.dumps(item) for item in json.loads(text))
            return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
        case "gbnf":
            return matcher.grammar_from_lark(lark_of_gbnf(text))
        case "lark":
            return matcher.grammar_from_lark(text)


def key_of(grammar: Grammar) -> bytes:
    """What a grammar is remembered by, however long its text is."""
    return hashlib.sha256(f"{grammar.kind} {grammar.text}".encode("utf-8", "surrogatepass")).digest()


def compiler_of(vocabulary: Vocabulary | None) -> GrammarCompiler:
    """Grammars over a model's tokens.

    Raises:
        InvalidRequestError: the model has no vocabulary.
    """
    if vocabulary is None:
        raise InvalidRequestError("grammars need a tokenizer, and this engine has none", param="grammar")
    return vocabulary.grammars


def unusable(grammar: Grammar, why: str) -> InvalidRequestError:
    """The error that tells a client why its grammar cannot be used."""
    why = why.strip()
    shown = why if len(why) <= _MAX_ERROR else f"{why[:_MAX_ERROR]}..."
    return InvalidRequestError(f"The {_KIND_NAMES[grammar.kind]} cannot be used: {shown}", param="grammar")


_KIND_NAMES = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "gbnf": "GBNF grammar",
    "lark": "Lark grammar",
}


class GrammarRow:
    """How far an answer is in its grammar: a `TokenFollower`.

    It hears of each token by `tell`, in order, and can be taken back; `refresh` makes the mask of the next one.
    Where the grammar may end, the tokens that end an answer are allowed too. Where it must, `completed_at` says so, and
    no such token is needed.

    Args:
        size: number of logits.
        num_prompt: where the answer's first token stands.
        endings: tokens that end the answer.

    Attributes:
        words: [size // 32 + 1] int32: bit i % 32 of word i // 32 says whether token i may come next.
        failure: why nothing may come any more, if that is so; the request ends with it.
    """

    def __init__(self, matcher: LLMatcher, size: int, num_prompt: int, endings: Sequence[int]) -> None:
        self.words: npt.NDArray[np.int32] = np.zeros(size // 32 + 1, np.int32)
        self.failure: str | None = None
        self._matcher = matcher
        self._size = size
        self._num_prompt = num_prompt
        self._endings = frozenset(endings)
        self._ending_words = _bits(endings, len(self.words))
        self._count = 0  # tokens heard of
        self._ended = False  # the last of them ended the answer
        self._complete: int | None = None  # number of tokens at which nothing can follow
        self._masked: int | None = None  # number of tokens that `words` speaks of
        self._seconds = 0.0

    def tell(self, position: int, token_id: int) -> None:
        """The token at `position` is `token_id`. One that was told before, or follows one that was not, is ignored."""
        if position - self._num_prompt != self._count or self._ended or self._complete is not None:
            return
        self._count += 1
        self._masked = None
        if token_id in self._endings:
            self._ended = True
            return
        self._timed(lambda: self._matcher.consume_token(token_id))
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self._complete = self._count

    def waits(self, position: int) -> bool:
        """Always: which tokens may come next follows from all of them."""
        return True

    def completed_at(self, position: int) -> bool:
        """Whether the token at `position` completed the answer, so that nothing may follow it."""
        return self._complete is not None and self._complete == position + 1 - self._num_prompt

    def rewind(self, position: int) -> None:
        """Forget the token at `position` and those after it."""
        kept = position - self._num_prompt
        if kept >= self._count:
            return
        consumed = self._count - self._ended
        if consumed > kept and not self._matcher.rollback(consumed - kept):
            self._fail(self._matcher.get_error())
        self._count, self._ended, self._complete, self._masked = kept, False, None, None

    def refresh(self, position: int) -> None:
        """Make `words` those of the token at `position`; nothing is allowed if the one before it is not known."""
        kept = position - self._num_prompt
        if kept != self._count or self._ended or self.failure is not None:
            self.words[:] = 0
            self._masked = None
            return
        if self._masked == kept:
            return
        self._masked = kept
        if self._matcher.is_stopped():  # with no token at all
            self.words[:] = self._ending_words
            if not self._matcher.is_accepting():
                self._fail(self._matcher.get_error())
            return
        self._timed(lambda: self._matcher.unsafe_compute_mask_ptr(self.words.ctypes.data, self.words.nbytes))
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        elif (self.words[self._size // 32] >> self._size % 32) & 1:
            self.words |= self._ending_words
        elif not self.words.any():
            self._fail(NO_TOKEN)
        if self._seconds > _SECONDS_AT_FIRST + _SECONDS_PER_TOKEN * self._count:
            self._fail(TOO_SLOW)

    def _timed(self, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        self._seconds += time.perf_counter() - began

    def _fail(self, why: str) -> None:
        self.words[:] = 0
        reason = NOTHING_FITS if why.startswith("NoExtension") else why.strip()[:_MAX_ERROR]
        self.failure = self.failure or f"the grammar cannot be followed: {reason}"


def _bits(token_ids: Sequence[int], count: int) -> npt.NDArray[np.int32]:
    """[count] words with the tokens' bits set."""
    flags = np.zeros(32 * count, np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
