"""`wdprobe rop`."""

from wd_probe.training.options import TrainOptions

from . import options as o
from .rop_and_train import Resume, run


@o.command(
    "model",
    given=o.Fields(
        TrainOptions(command="rop", every=1), but=("val_split", "train_samples", "both_moments")
    ),
)
def rop(given: o.Given[TrainOptions], resume: Resume = None, json: o.Json = False) -> None:
    """Train a model and measure how often weight decay pushes the wrong way (R_op, Eq. 10-11)."""
    run(given, resume, json)
