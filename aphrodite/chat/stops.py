"""A chat template's own stops: what ends an answer although the checkpoint may not call it end-of-sequence."""

from __future__ import annotations

import msgspec

from aphrodite.chat.template import ChatTemplate
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer


def with_template_stops(
    params: SamplingParams, template: ChatTemplate, tokenizer: Tokenizer, *, vocab_size: int
) -> SamplingParams:
    """`params` with the template's stops added: a single token as its id, any other text as a stop string.

    Nothing is added where `ignore_eos` asks for an answer that goes on.

    Args:
        vocab_size: tokens that the model has logits for.
    """
    if params.ignore_eos:
        return params
    stop, token_ids = list(params.stop), list(params.stop_token_ids)
    for text in template.traits.stop:
        token_id = tokenizer.token_to_id(text)
        if token_id is None:
            stop.append(text)
        elif token_id < vocab_size and token_id not in tokenizer.eos_token_ids:
            token_ids.append(token_id)
    return msgspec.structs.replace(
        params, stop=tuple(dict.fromkeys(stop)), stop_token_ids=tuple(dict.fromkeys(token_ids))
    )
