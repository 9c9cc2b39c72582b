"""A small model, its batches, the plain loop that trains it, and a listener that says nothing."""

import torch
from torch import nn
from torch.nn import functional as F


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 8, generator=generator).to(dtype)
    return images, torch.randint(0, 4, (32,), generator=generator)


def train(model, optimizer, steps, before=lambda: None, after=lambda: None):
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        images, labels = batch(step, dtype)
        F.cross_entropy(model(images).float(), labels).backward()
        before()
        optimizer.step()
        after()
        optimizer.zero_grad()


class Silent:
    def __getattr__(self, _):
        return lambda *_: None
