"""Which attention back end serves a model: the ordered list of candidates."""

from __future__ import annotations

from aphrodite.attention.backend import AttentionBackend, AttentionShape, QueryKeyTransform
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.latent_torch import TorchLatentAttention
from aphrodite.attention.torch_paged import SdpaAttention, TiledAttention
from aphrodite.kernels.dispatch import Choice, Declined, choose


def choose_attention(
    shape: AttentionShape | LatentShape, transform: QueryKeyTransform | LatentTransform
) -> tuple[AttentionBackend, Choice]:
    """The first back end that does not decline `shape`; the transform is of the same kind of attention."""
    if isinstance(shape, LatentShape) or isinstance(transform, LatentTransform):
        if not (isinstance(shape, LatentShape) and isinstance(transform, LatentTransform)):
            raise TypeError("shape and transform are of different kinds of attention")
        latent = TorchLatentAttention(shape, transform)
        return latent, Choice(latent.name, ())

    def tiled() -> AttentionBackend | Declined:
        return TiledAttention.decline(shape) or TiledAttention(shape, transform)

    def sdpa() -> AttentionBackend | Declined:
        return SdpaAttention(shape, transform)

    return choose("attention", [(TiledAttention.name, tiled), (SdpaAttention.name, sdpa)])
