"""timm's policies of augmentations."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import timm.data
import torch
from timm.data import auto_augment
from torch import Tensor

from ...errors import InputError, first_line, shown


class AutoAugment:
    """AutoAugment, RandAugment or AugMix by timm's code, as drawn from the global random state.

    Args:
        policy: timm's, such as ``rand-m9-mstd0.5-inc1``.
        img_size: side of the images.

    Raises:
        InputError: timm does not know the policy.
    """

    def __init__(self, policy: str, img_size: int) -> None:
        try:
            _, self._transform, _ = timm.data.create_transform(
                img_size, is_training=True, auto_augment=policy, color_jitter=0.0, separate=True
            )
        except Exception as error:
            raise InputError(
                f"--aa {shown(policy)} is none of timm's: {first_line(error)}"
            ) from error
        allow_no_bits(self._transform)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W), each image by itself; they are taken to the CPU for it."""
        from PIL import Image

        arrays = images.movedim(1, -1).cpu().numpy()
        found = [np.asarray(self._transform(Image.fromarray(array))) for array in arrays]
        return torch.from_numpy(np.stack(found)).movedim(-1, 1).to(images.device)


def allow_no_bits(transform: Any) -> None:
    """Let timm's policies posterize to 0 bits, a black picture, which Pillow refuses since 13."""
    for op in _ops(transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def _ops(part: Any) -> Iterator[Any]:
    if hasattr(part, "aug_fn"):
        yield part
    inner = part if isinstance(part, list) else ()
    for name in ("transforms", "ops", "policy"):
        inner = getattr(part, name, inner)
    for one in inner:
        yield from _ops(one)


def _posterize(picture: Any, bits_to_keep: int, **_: Any) -> Any:
    if bits_to_keep < 1:
        return picture.point(lambda _: 0)
    return auto_augment.posterize(picture, bits_to_keep)
