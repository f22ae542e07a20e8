"""Stored responses: bounded, counted once, apart for each owner; items as chat messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite.server.openai.responses.conversation import chat_messages
from aphrodite.server.openai.responses.items import Item, Message, OutputText
from aphrodite.server.openai.responses.reading import read_input
from aphrodite.server.openai.responses.store import ResponseStore, StoredItem, StoredResponse, stored

A, B = b"a", b"b"


def item(name: str, text: str = "x") -> StoredItem:
    (whole,) = stored([Message(name, "assistant", [OutputText(text)])])
    return whole


def response(name: str, *items: StoredItem, owner: bytes | None = A, body: bytes = b"{}") -> StoredResponse:
    return StoredResponse(name, owner, body, items[:-1], items[-1:])


def test_the_one_that_was_used_longest_ago_makes_room() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10**6)
    store.put(response("1", item("m1")))
    store.put(response("2", item("m2")))
    assert store.get(A, "1") is not None
    store.put(response("3", item("m3")))
    assert [store.get(A, name) is not None for name in "123"] == [True, False, True]
    assert store.find_item(A, "m2") is None
    assert store.find_item(A, "m3") is not None
    store.check()


def test_items_that_conversations_share_stay_until_the_last_has_gone() -> None:
    store = ResponseStore(max_responses=9, max_bytes=10**6)
    first, second = item("m1", "x" * 1000), item("m2")
    store.put(response("1", first))
    alone = store.num_bytes
    store.put(response("2", first, second))
    assert store.num_bytes - alone < alone  # the first item counts once
    assert store.delete(A, "1")
    assert store.find_item(A, "m1") is first
    assert not store.delete(A, "1")
    assert store.delete(A, "2")
    assert (len(store), store.num_bytes) == (0, 0)
    store.check()


def test_a_response_that_is_too_large_is_not_kept_and_others_keys_see_none() -> None:
    store = ResponseStore(max_responses=9, max_bytes=10_000)
    store.put(response("1", item("m1"), body=b"x" * 20_000))
    assert len(store) == 0
    store.put(response("2", item("m2")))
    store.put(response("3", item("m3", "x" * 20_000)))
    assert (len(store), store.find_item(A, "m3")) == (1, None)
    store.check()
    assert store.get(B, "2") is None
    assert store.get(None, "2") is None
    assert not store.delete(B, "2")
    assert store.find_item(B, "m2") is None
    assert not ResponseStore(max_responses=9, max_bytes=0).enabled


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 3000)),
        max_size=30,
    )
)
def test_the_bounds_hold_whatever_comes(steps: list[tuple[int, list[int], int]]) -> None:
    store = ResponseStore(max_responses=4, max_bytes=12_000)
    items = [item(f"m{number}", "x" * number * 300) for number in range(10)]
    for number, (name, chosen, size) in enumerate(steps):
        if size < 300:
            store.delete(A, f"{name}-{number - 1}")
        else:
            store.put(response(f"{name}-{number}", *(items[index] for index in chosen), body=b"x" * size))
        store.check()
        assert len(store) <= 4
        assert store.num_bytes <= 12_000


def read(*items: dict[str, Any]) -> list[Item]:
    return read_input(list(items), lambda _: None)


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "1"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "output_text", "text": text, "annotations": []}]}


@pytest.mark.parametrize(
    ("items", "roles"),
    [
        ([THOUGHT, said("A"), CALL, {**CALL, "call_id": "c2"}, OUTPUT], "assistant tool"),
        ([said("A"), said("B")], "assistant assistant"),
        ([CALL, said("A")], "assistant assistant"),
        ([THOUGHT, THOUGHT, CALL, OUTPUT, THOUGHT, said("B")], "assistant assistant tool assistant"),
        ([{"role": "developer", "content": "R"}, {"role": "user", "content": "Q"}], "developer user"),
    ],
)
def test_what_a_model_does_in_a_row_is_one_turn(items: list[Any], roles: str) -> None:
    assert " ".join(message["role"] for message in chat_messages(read(*items))) == roles


def test_contents_of_turns() -> None:
    (turn, result) = chat_messages(read(THOUGHT, said("A"), CALL, OUTPUT))
    assert (turn["content"], turn["reasoning_content"]) == ("A", "Hm.")
    assert turn["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "1"}
    parts = [{"type": "input_text", "text": "A"}, {"type": "input_text", "text": "B"}]
    system, user = chat_messages(read({"role": "user", "content": parts}), instructions="Rule.")
    assert system == {"role": "system", "content": "Rule."}
    assert [part["text"] for part in user["content"]] == ["A", "B"]
    (summed,) = chat_messages(read({"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}]}))
    assert summed == {"role": "assistant", "content": "", "reasoning_content": "S"}
