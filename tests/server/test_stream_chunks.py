"""The fast way to write a chunk equals the plain one; offsets point into the text."""

from __future__ import annotations

import json

from fake_engine import BOS, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from aphrodite.server.openai.chunks import ChunkWriter
from aphrodite.server.openai.logprobs import TextOffsets, TokenNames

HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": 'a"b\\'}


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    index=st.integers(0, 300),
    usage_key=st.booleans(),
    chat=st.booleans(),
)
def test_a_piece_of_text_is_the_same_bytes_either_way(text: str, index: int, usage_key: bool, chat: bool) -> None:
    def wrap(piece: str | None) -> dict[str, object]:
        return {"delta": {"content": piece}} if chat else {"text": piece}

    writer = ChunkWriter(HEAD, wrap, usage_key=usage_key)
    data = writer.text(index, text)
    assert data == writer.choice(index, text)
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    chunk = json.loads(data[6:])
    assert chunk["choices"][0] == {"index": index, **wrap(text), "logprobs": None, "finish_reason": None}
    assert ("usage" in chunk) == usage_key
    assert {key: chunk[key] for key in HEAD} == HEAD


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), as_ids=st.booleans())
def test_offsets_cut_the_text_at_characters(text: str, as_ids: bool) -> None:
    names = TokenNames(byte_tokenizer(), as_ids=as_ids)
    offsets = TextOffsets(names, frozenset({BOS}))
    token_ids = [BOS, *text.encode()]
    starts = [offsets.push(token_id) for token_id in token_ids]
    # Independently: the characters that are complete before each byte.
    data = text.encode()
    expected = [len(data[:count].decode(errors="ignore")) for count in range(len(data) + 1)]
    assert starts == [0, *expected[:-1]]


def test_names_of_tokens_are_distinct() -> None:
    names = TokenNames(byte_tokenizer(), as_ids=False)
    assert len({names.name(token_id) for token_id in range(258)}) == 258
