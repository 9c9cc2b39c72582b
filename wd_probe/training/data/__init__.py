"""Image classification data, ready for training."""

from .catalogue import Batch, Batches, Data, HeldBatches, load_data, load_images

__all__ = ["Batch", "Batches", "Data", "HeldBatches", "load_data", "load_images"]
