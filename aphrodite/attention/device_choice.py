"""Which attention back end serves a model on a GPU."""

from __future__ import annotations

from aphrodite.attention.backend import AttentionShape, QueryKeyTransform
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.latent_triton import TritonLatentAttention
from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.kernels.dispatch import Declined


def decline_device_attention(shape: AttentionShape | LatentShape) -> Declined | None:
    """Why no back end serves `shape`, None if one does."""
    return TritonLatentAttention.decline(shape) if isinstance(shape, LatentShape) else TritonAttention.decline(shape)


def device_attention(
    shape: AttentionShape | LatentShape, transform: QueryKeyTransform | LatentTransform
) -> TritonAttention | TritonLatentAttention:
    """The back end of a shape that is not declined; the transform is of the same kind of attention."""
    if isinstance(shape, LatentShape) and isinstance(transform, LatentTransform):
        return TritonLatentAttention(shape, transform)
    if isinstance(shape, LatentShape) or isinstance(transform, LatentTransform):
        raise TypeError("shape and transform are of different kinds of attention")
    return TritonAttention(shape, transform)
