"""Measurements to TensorBoard: few tags, one event file."""

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np

from ..errors import InputError, counted
from ..layering import Layer, Layers
from ..probe.dynamics import decaying
from ..probe.records import StepRecord, Tally, fields, summed
from ..wording import percent
from .decay_tables import LAYER_COLUMNS, in_all, layer_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


P = ParamSpec("P")

#: What decay did, of the weights that decay: by name, what its charts show.
_DECAY = {
    "balance": "What the step gives back of the squared norm that decay takes off: 1 is balance.",
    "angular_update": "The angle that a step turns the weights by, in radians.",
    "relative_update": "How large the step alone is beside the weights.",
    "remaining": "The share of what stood at the start that decay has left.",
}


def _writes(
    method: Callable[Concatenate["Dashboard", P], None],
) -> Callable[Concatenate["Dashboard", P], None]:
    """Whatever the file system's own library raises is an OSError."""

    @functools.wraps(method)
    def write(self: "Dashboard", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"TensorBoard's file: {error}") from error

    return write


def _hush() -> None:
    """Keep TensorBoard's writing threads from printing the error that the next write raises."""
    tell = threading.excepthook
    if getattr(tell, "hushed", False):
        return

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            tell(args)

    hook.hushed = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class Dashboard:
    """Writes one run's event file.

    Args:
        folder: the run folder.
        stages: the model's coarse layers, each of which gets a chart.

    Raises:
        OSError: it cannot be written; by every method.
    """

    def __init__(self, folder: Path, stages: Layers) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush()
        self.stages = stages
        self._explained: set[str] = set()
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    @_writes
    def scalars(
        self,
        step: int,
        values: Mapping[str, float],
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Add a point to each named chart; a value that is not a number is left out.

        Args:
            step: where they stand.
            values: by the chart's tag.
            about: by the tag what a chart shows, to be read beside it.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if math.isfinite(value)
        ]
        for point in points:
            if point.tag in about and point.tag not in self._explained:  # once a file is enough
                self._explained.add(point.tag)
                point.metadata.summary_description = about[point.tag]
                point.metadata.plugin_data.plugin_name = "scalars"
        if points:
            self._writer._get_file_writer().add_summary(Summary(value=points), step)

    def record(self, step: int, record: StepRecord) -> None:
        """Add a measured step: R_op and what decay did, in total and of each stage."""
        decayed = decaying(record)
        values = {
            "R_op/rate": record.rate,
            "R_op/mass": record.mass,
            "R_op/flip_rate": record.flip_rate,
            **{f"decay/{name}": value for name, value in _decay(decayed.total).items()},
        }
        about = {f"decay/{name}": told for name, told in _DECAY.items()}
        rows = summed(self.stages, record.names, decayed.values)
        for stage, row in zip(self.stages, rows, strict=True):
            tally, where = Tally(*fields(row)), self._depth(stage)
            for name, value in {"R_op": tally.rate, **_decay(tally)}.items():
                values[tag := f"{name} by stage/{where}"] = value
                place = f"Stage {stage.index} of {len(rows)}: {stage.name}."
                about[tag] = f"{place} {_DECAY.get(name, '')}".rstrip()
        self.scalars(step, values, about)

    def _depth(self, stage: Layer) -> str:
        """A stage by its place, which models have in common whatever they call it."""
        return "last" if stage.index == len(self.stages) else f"{stage.index:02d}"

    @_writes
    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """Add a figure as an image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from .letters import show_letters

        show_letters(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    @_writes
    def text(self, tag: str, markdown: str) -> None:
        """Add a text in Markdown."""
        self._writer.add_text(tag, markdown)

    @_writes
    def hparams(
        self, options: Mapping[str, str | float | int | bool], results: Mapping[str, float]
    ) -> None:
        """Add the row that the HParams tab compares runs by."""
        self._writer.add_hparams(dict(options), dict(results), run_name=".")

    def summary(
        self,
        summary: Mapping[str, Any],
        options: Mapping[str, str | float | int | bool],
        figures: Mapping[str, "Figure"],
    ) -> None:
        """Add the end of a run: its figures, its summary as a text, its row in the HParams tab."""
        for name, figure in figures.items():
            self.figure(f"figures/{name}", figure, summary["steps"])
        self.text("summary", _markdown(summary))
        results = {"hparams/top1": summary["top1"]}
        if "rate" in summary:
            results |= {
                "hparams/R_op mean": summary["rate"]["mean"],
                "hparams/R_op max": summary["rate"]["max"],
            }
        if "dynamics" in summary:
            found = summary["dynamics"]
            results |= {
                "hparams/remaining": found["remaining"],
                "hparams/balance": found["balance"]["mean"],
                "hparams/angular_update": found["angular_update"]["mean"],
            }
        self.hparams(options, results)

    @_writes
    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    @_writes
    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()


def _decay(tally: Tally) -> dict[str, float]:
    """What decay did, by name; nothing of what is left where none decays."""
    found = {name: float(getattr(tally, name)) for name in _DECAY}
    return found if tally.held else found | {"remaining": math.nan}


def _markdown(summary: Mapping[str, Any]) -> str:
    lines = [
        f"**{summary['model']}** on {summary['dataset']}, {summary['optimizer']}, method "
        f"{summary['method']}, η {summary['lr']:g}, λ {summary['weight_decay']:g}, "
        f"{counted(summary['steps'], 'step')}, top-1 {percent(summary['top1'], 1)} "
        f"({summary['status']})",
    ]
    if "rate" not in summary:
        return lines[0]
    lines += _items(summary.get("verdict", ()))
    if "dynamics" in summary:
        lines += _table(("what decay did", ""), list(in_all(summary).items()))
        lines += _table(LAYER_COLUMNS, layer_table(summary["layers"]))
    shares = {
        "R_op (share of weights)": summary["rate"],
        "R_op by size (share of penalty)": summary["mass"],
        "sign flips by the step alone": summary["flip_rate"],
    }
    lines += _table(
        ("", "mean", "max", "last"),
        [(title, *map(percent, found.values())) for title, found in shares.items()],
    )
    lines += _items(summary["findings"])
    worst = sorted(
        (layer for layer in summary["layers"] if math.isfinite(layer["rate"])),
        key=lambda layer: -layer["rate"],
    )[:5]
    lines += _table(
        ("layer", "R_op"), [(f"{x['index']} {x['name']}", percent(x["rate"])) for x in worst]
    )
    return "\n".join(lines)


def _items(sentences: Sequence[str]) -> list[str]:
    return ["", *(f"- {sentence}" for sentence in sentences)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))]


def serve(folder: Path, port: int, host: str = "localhost") -> str:
    """Start TensorBoard on a folder in this process, and return its address.

    Raises:
        InputError: the folder does not exist, or the port is taken.
    """
    import logging
    import warnings

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; run `wdprobe rop` first, or name another")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard imports pkg_resources
        from tensorboard import default, program

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        # The projector reads whatever files a folder's own configuration names.
        plugins = [p for p in default.get_plugins() if getattr(p, "plugin_name", "") != "projector"]
        board = program.TensorBoard(plugins=plugins)
        arguments: Sequence[str] = (
            "tensorboard",
            "--logdir",
            str(folder),
            "--host",
            host,
            "--port",
            str(port),
            "--load_fast",
            "false",  # its default prints a note about itself
        )
        board.configure(argv=list(arguments))
        try:
            return str(board.launch())
        except program.TensorBoardServerException as error:
            raise InputError(f"TensorBoard cannot start: {error}; try --port 0") from error
