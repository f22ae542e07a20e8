"""Which attention back end serves a model: the ordered list of candidates."""

from __future__ import annotations

from aphrodite.attention.backend import AttentionBackend, AttentionShape, QueryKeyTransform
from aphrodite.attention.torch_paged import SdpaAttention, TiledAttention
from aphrodite.kernels.dispatch import Choice, Declined, choose


def choose_attention(shape: AttentionShape, transform: QueryKeyTransform) -> tuple[AttentionBackend, Choice]:
    """The first back end that does not decline `shape`."""

    def tiled() -> AttentionBackend | Declined:
        return TiledAttention.decline(shape) or TiledAttention(shape, transform)

    def sdpa() -> AttentionBackend | Declined:
        return SdpaAttention(shape, transform)

    return choose("attention", [(TiledAttention.name, tiled), (SdpaAttention.name, sdpa)])
