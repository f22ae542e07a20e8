"""Decline-style dispatch."""

from __future__ import annotations

import logging

import pytest

from aphrodite.kernels.dispatch import Declined, choose


def test_the_first_that_accepts_is_taken_and_later_ones_are_not_asked() -> None:
    asked = []

    def last() -> int:
        asked.append("last")
        return 3

    result, choice = choose("test", [("a", lambda: Declined("too small")), ("b", lambda: 2), ("c", last)])
    assert result == 2
    assert choice.name == "b"
    assert str(choice) == "b (a: too small)"
    assert asked == []


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose("logged once", [("a", lambda: Declined("no")), ("b", lambda: 1)])
    assert [record.getMessage() for record in caplog.records] == ["logged once: b (a: no)"]


def test_none_left_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="a: too small; b: too old"):
        choose("test", [("a", lambda: Declined("too small")), ("b", lambda: Declined("too old"))])
