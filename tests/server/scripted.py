"""An engine that answers with a text of the test's own, for answers that the server takes apart."""

from __future__ import annotations

import itertools
from functools import cache

import tokenizers
from fake_engine import BOS, EOS, FakeEngine, FakeModel, byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from aphrodite.chat.table import TEMPLATES
from aphrodite.chat.template import ChatTemplate
from aphrodite.core.request import RequestUpdate
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "[TOOL_CALLS]", "<|message|>", "<|channel|>")


@cache
def marked_tokenizer() -> Tokenizer:
    """One token a byte, and special tokens for the marks of some formats."""
    vocab = byte_tokenizer()
    texts = [vocab.token_text(token_id) for token_id in (BOS, EOS)]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = itertools.count(256)
    names = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*texts, *SPECIAL])
    return Tokenizer(backend, SpecialTokens(bos_id=BOS, eos_ids=(EOS,)), "marked tokenizer")


class ScriptedEngine(FakeEngine):
    """Answers every prompt with `text`, then ends."""

    def __init__(self, template: str, text: str = "", max_model_len: int = 8192) -> None:
        row = TEMPLATES.get(template)
        tokenizer = marked_tokenizer()
        super().__init__(
            model=FakeModel(max_model_len=max_model_len, vocab_size=BOS + 2 + len(SPECIAL)),
            tokenizer=tokenizer,
            chat_template=ChatTemplate(template if row is None else row.source, eos_token="</s>", bos_token="<s>"),
        )
        self.text = text

    @property
    def prompt(self) -> str:
        """The latest request's prompt."""
        return self.tokenizer.decode(self.seen[-1][0], skip_special_tokens=False)

    def _update(
        self, prompt: list[int], params: SamplingParams, step: int, index: int, answer_id: str
    ) -> RequestUpdate:
        script = [*self.tokenizer.encode(self.text, add_special_tokens=False), EOS]
        token = script[step]
        logprobs = None if params.logprobs is None else [self._logprobs(token, params.logprobs)]
        stops = token == EOS or token in params.stop_token_ids
        reason = "stop" if stops else "length" if step + 1 == params.max_tokens else None
        return RequestUpdate(answer_id, [token], logprobs, finish_reason=reason)
