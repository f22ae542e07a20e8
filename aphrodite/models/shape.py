"""What the engine needs to know of any model, built in or not: sizes, not how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ModelShape(Protocol):
    """Sizes of a decoder. `ModelSpec` says them of a built-in family, `ForeignSpec` of any other."""

    @property
    def family(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSpec:
    """A model that transformers computes: what was seen of its attention when it was tried without weights.

    Attributes:
        family: its `model_type`.
        windows: an entry a layer: how many latest positions (the current one included) a query sees, None for all.
        query_scale: what attention scores are multiplied by.
        softcap: c where scores become c * tanh(score / c); 0 for none.
        rotary_scaling: transformers' word for how its rotary embedding is scaled, "none" where it is not.
        tied_head: the head shares the embedding's weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    windows: tuple[int | None, ...]
    query_scale: float
    softcap: float
    rotary_scaling: str
    tied_head: bool
