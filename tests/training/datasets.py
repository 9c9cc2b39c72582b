"""Datasets opened, and small ones written."""

import gzip
import struct

import numpy as np
import torch

from wd_probe.training.data import load_data

CPU = torch.device("cpu")


def open_data(name, **options):
    defaults = {"batch_size": 16, "img_size": 32, "device": CPU, "seed": 0}
    return load_data(name, **{**defaults, **options})


def write_idx(folder, name, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(folder / f"{name}.gz", "wb") as file:
        file.write(header + array.tobytes())


def idx_files(folder):
    """Forty pictures and twenty, as gzipped idx files."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        write_idx(folder, f"{part}-images-idx3-ubyte", pictures)
        write_idx(folder, f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
