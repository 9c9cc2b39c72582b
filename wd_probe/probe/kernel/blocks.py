"""Many tensors' memory cut into blocks of one size, whatever the tensors' own."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...sharding import PLAIN

Integers = NDArray[np.int64]


class Blocks:
    """Where the blocks of some tensors lie, in the order of the tensors.

    Args:
        tensors: laid out without gaps.
        block: most elements of a block.

    Attributes:
        numbers: for each block the tensor it is of.
        starts: the element of it that the block begins with.
        sizes: how many elements.
        ends: for each tensor the number of blocks up to and with it.
    """

    def __init__(self, tensors: Sequence[Tensor], block: int) -> None:
        elements = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)
        counts = -(-elements // block)
        self.ends: Integers = counts.cumsum()
        self._begins = self.ends - counts
        self._filled = counts > 0
        self.numbers: Integers = np.repeat(np.arange(len(counts)), counts)
        self.starts = (np.arange(len(self.numbers)) - self._begins[self.numbers]) * block
        self.sizes = np.minimum(block, elements[self.numbers] - self.starts)

    def addresses(self, tensors: Sequence[Tensor]) -> Integers:
        """The address of each block in tensors as long as these, all of one dtype."""
        begins = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        width = tensors[0].element_size() if tensors else 1
        found: Integers = begins[self.numbers] + width * self.starts
        return found

    def summed(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each tensor's sum of its blocks' rows."""
        result = np.zeros((len(self.ends), rows.shape[1]))
        result[self._filled] = np.add.reduceat(rows, self._begins[self._filled])
        return result


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are plain ones on one device, laid out alike without gaps."""
    if type(one) not in PLAIN or type(other) not in PLAIN or one.device != other.device:
        return False
    if one.is_contiguous() and other.is_contiguous():
        return True
    return one.stride() == other.stride() and _is_dense(one)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    return (
        tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )
