"""Triton 3.6's interpreter keeps scalars as arrays of one element, which numpy >= 2.4 takes for no loop bound."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _scalars_as_loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
