"""Which streamed layers share device tensors."""

from __future__ import annotations

import pytest

from aphrodite.models.streaming import SLOTS, slots_of


@pytest.mark.parametrize("kinds", ["aaaaaa", "abababab", "aabbaabba", "abcabc", "aaab", "baaaab", "a"])
def test_layers_take_turns_in_two_slots_of_their_kind(kinds: str) -> None:
    slots = slots_of(kinds)
    for number, slot in enumerate(slots):
        assert kinds[slot] == kinds[number]
        assert slots[slot] == slot  # it is there from the beginning
        assert number == 0 or slot != slots[number - 1]
    for kind in set(kinds):
        assert len({slot for slot in slots if kinds[slot] == kind}) == min(SLOTS, kinds.count(kind))


def test_a_layer_is_copied_when_the_last_user_of_its_slot_is_two_layers_behind() -> None:
    slots = slots_of("aabbaabbab")
    users: dict[int, int] = {}
    for number, slot in enumerate(slots):
        assert number - users.get(slot, -SLOTS) >= SLOTS
        users[slot] = number
