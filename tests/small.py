"""A small model, its batches, the loop that trains it, an oracle beside it; a small run."""

import csv
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import reference

LR, RATE = 0.05, 0.3


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 8, generator=generator).to(dtype)
    return images, torch.randint(0, 4, (32,), generator=generator)


def loss_of(model, step):
    images, labels = batch(step, next(model.parameters()).dtype)
    return F.cross_entropy(model(images).float(), labels)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=RATE, **options)


def train(model, optimizer, steps, before=lambda: None, after=lambda: None):
    for step in range(steps):
        loss_of(model, step).backward()
        before()
        optimizer.step()
        after()
        optimizer.zero_grad()


class Oracle:
    """Counts each step with the float64 oracle, from the weights before and after it."""

    def __init__(self, named, c=LR * RATE):
        self.named, self.c, self.kept, self.steps = dict(named), c, {}, []

    def before(self):
        self.kept = {name: p.detach().clone() for name, p in self.named.items()}

    def after(self):
        self.steps.append(
            {
                name: reference.tally(self.kept[name], p.detach(), self.c)
                for name, p in self.named.items()
            }
        )

    def agrees_with(self, records):
        assert len(records) == len(self.steps)
        for record, tensors in zip(records, self.steps, strict=True):
            for name, expected in tensors.items():
                found = record.tensors[name]
                for count in ("penalized", "opposing", "flipped"):
                    assert getattr(found, count) == expected[count], (record.step, name)
        assert sum(t["opposing"] for tensors in self.steps for t in tensors.values()) > 0


def counted(model, optimizer, c, steps):
    """Train while the oracle counts: of every step, by tensor."""
    oracle = Oracle(model.named_parameters(), c)
    train(model, optimizer, steps, oracle.before, oracle.after)
    return oracle.steps


#: What a command takes to be over soon.
FAST = ["--model", "test_convnext", "--batch-size", "32"]


def rows(path):
    """The lines of a table that a run has written."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def start(tmp_path, *arguments, **env):
    """A command in a process of its own."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup and in CI

    return subprocess.Popen(
        [sys.executable, "-c", "from wd_probe.cli.main import main; main()", *map(str, arguments)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=prepare, env={**os.environ, **env},
    )  # fmt: skip


@contextmanager
def undrawn():
    """Runs are not drawn at their end."""

    def without(recorder, summary, options):
        if recorder._board is not None:
            recorder._board.summary(summary, options, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wd_probe.runs.recorder.Recorder._draw", without)
        yield


class Silent:
    """A listener that says nothing."""

    def __getattr__(self, _):
        return lambda *_: None
