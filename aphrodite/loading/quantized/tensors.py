"""Taking a quantized module's tensors out of a checkpoint, with every type and shape checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.safetensors import StoredTensor

DENSE_TYPES = ("F16", "BF16", "F32")
_NUMPY = {"I32": "<u4", "U32": "<u4", "I64": "<i8", "I8": "i1", "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1"}


class ModuleTensors:
    """What is left of a checkpoint's tensors, and whatever has been made of the others.

    Args:
        tensors: by name; those that are taken are removed.
        method: for errors.
    """

    def __init__(self, tensors: dict[str, StoredTensor], method: str) -> None:
        self._tensors = tensors
        self._method = method

    def modules_with(self, suffix: str) -> Iterator[str]:
        """Names of the modules that have a tensor `{module}{suffix}`."""
        for name in [name for name in self._tensors if name.endswith(suffix)]:
            yield name.removesuffix(suffix)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def dtype_of(self, name: str) -> str:
        """The type of a tensor.

        Raises:
            ModelFormatError: it is missing.
        """
        return self._found(name).dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, () where it is missing."""
        tensor = self._tensors.get(name)
        return tensor.shape if tensor is not None else ()

    def drop(self, name: str) -> None:
        """Leaves a tensor out that has no use where activations are not quantized."""
        self._tensors.pop(name, None)

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None) -> StoredTensor:
        """Removes a tensor from the checkpoint.

        Args:
            dtypes: the types that it may have.
            shape: that it must have, None for any size but 0 in its place; None for any shape.

        Raises:
            ModelFormatError: it is missing, or of another type or shape.
        """
        tensor = self._found(name)
        if tensor.dtype not in dtypes:
            raise self.mismatch(tensor, "stored as " + " or ".join(dtypes))
        if shape is not None and (
            len(shape) != len(tensor.shape)
            or not all(
                size == want or (want is None and size > 0) for want, size in zip(shape, tensor.shape, strict=True)
            )
        ):
            raise self.mismatch(tensor, "of shape [" + ", ".join("any" if n is None else str(n) for n in shape) + "]")
        del self._tensors[name]
        return tensor

    def _found(self, name: str) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFormatError(
                f"{self._source}: tensor {name!r} is missing, which {self._method} checkpoints have; "
                "the checkpoint is incomplete: download it again"
            )
        return tensor

    def mismatch(self, tensor: StoredTensor, expected: str) -> ModelFormatError:
        """The error for a tensor that is not what the method says."""
        return ModelFormatError(
            f"{tensor.source}: tensor {tensor.name!r} should be {expected} ({self._method}), but is {tensor.dtype} "
            f"{list(tensor.shape)}; the checkpoint is damaged or of a variant that is not supported"
        )

    @property
    def _source(self) -> str:
        return str(next(iter(self._tensors.values())).source) if self._tensors else "the checkpoint"


def numbers(tensor: StoredTensor) -> np.ndarray:
    """The integers of a tensor (float8 as its bits), a view of its shape; int32 words come as uint32."""
    return tensor.data.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)


def group_size_of(tensor: StoredTensor, columns: int, group_size: int) -> int:
    """Inputs of a module with `columns` of them that share a scale; -1 stands for all.

    Raises:
        ModelFormatError: they do not divide the inputs.
    """
    size = columns if group_size == -1 else group_size
    if columns < 1 or columns % size:
        raise ModelFormatError(
            f"{tensor.source}: groups of {size} do not divide the {columns} inputs of {tensor.name!r}; "
            "weights and configuration do not belong together"
        )
    return size
