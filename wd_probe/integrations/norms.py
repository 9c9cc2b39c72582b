"""Which of a model's batch norms train: those whose running statistics a loop has moved."""

import statistics
from collections.abc import Iterable

from torch import Tensor, nn

from ..runs.verdict import BatchNorms
from ..training.batch_norm import batch_norms


class Norms:
    """The batch norms of a model, which is not kept alive.

    Args:
        model: about to train.
        parameters: its weights by name.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> None:
        names = {id(p): name for name, p in parameters}
        self._seen = [
            (layer.momentum, count, count.clone(), names.get(id(layer.weight), ""))
            for layer in batch_norms(model)
            if (count := layer.num_batches_tracked) is not None
        ]

    def moved(self) -> BatchNorms | None:
        """Those that have seen batches since; None if none has."""
        found = [
            (1 / int(count) if momentum is None else momentum, name)
            for momentum, count, before, name in self._seen
            if int(count) > int(before)
        ]
        if not found:
            return None
        momenta, names = zip(*found, strict=True)
        return BatchNorms(len(found), statistics.median(momenta), frozenset(names))
