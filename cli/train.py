"""`wdprobe train`."""

from wd_probe.training.options import TrainOptions

from . import options as o
from .rop_and_train import Resume, run


@o.command(
    "model", given=o.Fields(TrainOptions(opt="adam", method="lpwd"), help={"every": o.EVERY})
)
def train(given: o.Given[TrainOptions], resume: Resume = None, json: o.Json = False) -> None:
    """Train a model with a decay method of the paper (Algorithms 1-3) and keep the checkpoint."""
    run(given, resume, json)
