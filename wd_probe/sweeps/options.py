"""What decides how much of a table or figure of the paper is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..training.option import AT_LEAST_1, Option, check_options
from ..training.options import TrainOptions

#: Section 4: ImageNet-21k weights, 100 epochs, batch 512, constant η, 32×32, flips.
SETTING = TrainOptions(
    pretrained=True, batch_size=512, epochs=100, val_split=0.1, every=10, both_moments=True
)
#: The tables and figures that can be run again.
Name = Literal["table1", "table3", "fig1", "fig2", "fig3a", "fig3b", "fig4", "fig5"]

_GRID, _OWN = "Grid", "comma-separated (default: the paper's)."


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperOptions:
    """What to run. An empty tuple takes the experiment's own values, those of the paper."""

    models: Annotated[tuple[str, ...], Option(f"timm models, {_OWN}", _GRID, flag="--model")] = ()
    datasets: Annotated[tuple[str, ...], Option(f"Datasets, {_OWN}", _GRID, flag="--dataset")] = ()
    opts: Annotated[tuple[str, ...], Option(f"timm optimizers, {_OWN}", _GRID, flag="--opt")] = ()
    methods: Annotated[tuple[str, ...], Option(f"Methods, {_OWN}", _GRID, flag="--method")] = ()
    lrs: Annotated[tuple[float, ...], Option(f"Learning rates η, {_OWN}", _GRID, flag="--lr")] = ()
    weight_decays: Annotated[
        tuple[float, ...], Option(f"Decay rates λ, {_OWN}", _GRID, flag="--weight-decay")
    ] = ()
    seeds: Annotated[int, Option("Runs of each cell.", _GRID, AT_LEAST_1)] = 3
    setting: TrainOptions = SETTING
    output: Path = Path("runs/paper")

    def __post_init__(self) -> None:
        check_options(self)
