"""Which attention back end serves a model on a GPU."""

from __future__ import annotations

from aphrodite.attention.backend import AttentionShape, QueryKeyTransform
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.kernels.dispatch import Declined


def decline_device_attention(shape: AttentionShape | LatentShape) -> Declined | None:
    """Why no back end serves `shape`, None if one does."""
    if isinstance(shape, LatentShape):
        return Declined("its attention is latent, for which there are no kernels on a GPU")
    return TritonAttention.decline(shape)


def device_attention(
    shape: AttentionShape | LatentShape, transform: QueryKeyTransform | LatentTransform
) -> TritonAttention:
    """The back end of a shape that is not declined; the transform is of the same kind of attention."""
    if isinstance(shape, LatentShape) or isinstance(transform, LatentTransform):
        raise TypeError("shape and transform are of different kinds of attention, or of one that was declined")
    return TritonAttention(shape, transform)
