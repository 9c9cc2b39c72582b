"""What a loop over images is given: batches, and the parts of a dataset that hand them out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """Batches of (float32 images (B, 3, H, W), normalized; int64 labels (B,)), again and again."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """One epoch without its first batches; all it draws at random is drawn in this call.

        But for augmentations, which are drawn from the global random state with each batch.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What decides the epochs to come, beside the global random state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """A dataset ready for training: ``train`` shuffles and flips, the others do neither."""

    name: str
    num_classes: int
    train: Batches
    test: Batches
    train_size: int
    test_size: int
    hflip: float
    validation: Batches | None = None
    validation_size: int = 0
