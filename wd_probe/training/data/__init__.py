"""Image classification data, ready for training."""

from .batches import Batch, Batches, Data
from .catalogue import load_data
from .held import HeldBatches
from .pictures import load_images

__all__ = ["Batch", "Batches", "Data", "HeldBatches", "load_data", "load_images"]
