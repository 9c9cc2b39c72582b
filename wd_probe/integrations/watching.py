"""Any training script, unedited: every optimizer of torch's kind that steps is measured."""

import atexit
import os
import shlex
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, get_args

from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

from ..arguments import as_path, check_choice, check_count
from ..errors import InputError, counted, first_line, printable
from ..hooks import hooked_all, is_captured, untraced
from ..probe.copies import Keep
from ..ranks import known_rank
from ..wording import percent
from .ending import ENDINGS, close_at_exit

if TYPE_CHECKING:
    from ..runs.recorder import Recorder
    from .own_loop import OpposingPenaltyProbe
    from .watched import Choices, Watched

#: So many models get a run folder each; scripts that make them by the thousand need no more.
_MOST = 16
NO_STEP = (
    "no optimizer step was seen, so nothing was measured: look for updates without a "
    "torch.optim.Optimizer, steps in child processes (`wdprobe watch --children`), or a CUDA graph"
)

_watching: "Watch | None" = None


def watch(
    output: str | os.PathLike[str] | None = None, every: int = 1, keep: Keep = "whole"
) -> "Watch":
    """Measure every optimizer that steps from here on; one line at the top of a script.

    Neither model nor optimizer is given: an optimizer is met at its first step, which is measured
    too, and its model is the smallest module that owns its parameters. Every model has a run
    folder, written as `wdprobe rop` writes it. A summary goes to stderr when the script ends, or
    the watch is closed. A second call ends the first one's watch.

    Args:
        output: the run folder; default ``runs/watch-SCRIPT-DATE-TIME``. Further models have one of
            the same name with a number behind it.
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        keep: see :class:`wd_probe.OpposingPenaltyProbe`.

    Returns:
        A handle: ``probes``, ``close()``; a context manager.

    Raises:
        InputError: every < 1, an unknown keep, or a folder that holds a run.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder, watch(f"{folder}/mine") as watching:
        ...     optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
        ...     net(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> watching.probes[0].total.penalized
        10
    """
    started = sys.argv[0] if sys.argv and "ipykernel" not in sys.modules else ""
    name = Path(started or "session").name
    return Watch(output, every, keep, script=name, command_line=shlex.join(sys.argv))


class Watch:
    """What :func:`wd_probe.watch` returns.

    Attributes:
        status: how the script ended, as it will be written down.
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None,
        every: int,
        keep: Keep,
        *,
        script: str,
        command_line: str,
        tells_idle: bool = True,
    ) -> None:
        global _watching
        check_count(every, "every")
        check_choice(keep, "keep", get_args(Keep))
        path, self._from = None if output is None else as_path(output, "output"), Path.cwd()
        if path is not None:
            from ..runs.folder import check_free

            check_free(path)
        self._chosen = (path, every, keep, script, command_line)
        self.status, self._tells_idle = "finished", tells_idle
        self._notes: Any = None
        self._recordings: list[weakref.ref[Watched]] = []  # their optimizers hold them
        self._recorders: list[Recorder] = []  # garbage's open files are closed before it can write
        self._ended: list[Watched] = []
        self._measured: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._passed_by: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._lock, self._process, self._is_open = threading.RLock(), os.getpid(), True
        if _watching is not None:
            _watching.close()
        _watching = self
        self._hook = optimizer_module.register_optimizer_step_pre_hook(untraced(self._before))
        ENDINGS.add(self._stop)
        atexit.register(self._at_exit)

    # --- an optimizer is about to step ------------------------------------------------------------

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in self._measured or optimizer in self._passed_by:
            return
        if self._is_open and os.getpid() == self._process and not is_captured():
            self._safely(lambda: self._meet(optimizer))

    def _safely(self, call: Callable[[], None]) -> None:
        """What fails here must not end somebody's training, and a signal waits until it is done."""
        with ENDINGS.wait(), self._lock:
            try:
                call()
            except Exception as error:
                why = first_line(error)
                self.notes(f"not everything is measured: {why}", about=why)

    def _meet(self, optimizer: Optimizer) -> None:
        if self._is_inside_another(optimizer) or not _speaks_for(optimizer):
            self._passed_by.add(optimizer)
            return
        try:
            steps = hooked_all(optimizer)
        except InputError as error:
            self._pass_by(optimizer, first_line(error))
            return
        if steps != (optimizer,):  # those come by themselves
            self._passed_by.add(optimizer)
            return
        try:
            self._measure(optimizer)
            self._measured.add(optimizer)
        except Exception as error:
            self._pass_by(optimizer, first_line(error))

    def _is_inside_another(self, optimizer: Optimizer) -> bool:
        """Whether it steps for one that is measured, which then is counted once."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == optimizer_module.__file__:
                other = frame.f_locals.get("self")
                if (
                    other is not optimizer
                    and isinstance(other, Optimizer)
                    and other in self._measured
                ):
                    return True
            frame = frame.f_back
        return False

    def _pass_by(self, optimizer: Optimizer, why: str) -> None:
        self._passed_by.add(optimizer)
        name = type(optimizer).__name__
        self.notes(f"the steps of {name} are not measured: {why}", about=f"{name}: {why}")

    def _measure(self, optimizer: Optimizer) -> None:
        from .owners import find_owner, parameters_of
        from .watched import Watched

        if not parameters_of(optimizer):
            raise InputError("it holds no parameters")
        known = [one for ref in self._recordings if (one := ref()) is not None]
        for recording in known:
            if recording.owns(optimizer):
                recording.join(optimizer)
                self._measured = weakref.WeakSet(
                    one for one in self._measured if any(r.measures(one) for r in known)
                )
                return
        if len(self._recordings) >= _MOST:
            raise InputError(f"{counted(_MOST, 'model')} are measured already, and no more are")
        recording = Watched(
            find_owner(optimizer),
            optimizer,
            self._choices(),
            self._free_path(),
            self.notes,
            self._safely,
            self._retire,
        )
        self._recordings.append(weakref.ref(recording))
        self._recorders.append(recording.recorder)

    def _choices(self) -> "Choices":
        from .watched import Choices

        return Choices(*self._chosen)

    def _free_path(self) -> Path:
        from ..runs.folder import default_folder, occupied

        number = len(self._recordings) + 1
        if number == 1:
            named = self._chosen[0] or default_folder("watch", Path(self._chosen[3]).stem)
            self._first = self._from / named  # wherever the script has gone since
            return self._first
        names = (self._first.with_name(f"{self._first.name}-{k}") for k in range(number, 1000))
        return next(path for path in names if not occupied(path))

    # --- what is told -----------------------------------------------------------------------------

    @property
    def notes(self) -> Any:
        """Says once what cannot be measured."""
        if self._notes is None:
            from .watched import Notes

            self._notes = Notes(_note)
        return self._notes

    @property
    def probes(self) -> "tuple[OpposingPenaltyProbe, ...]":
        """One for each model, in the order of their first steps."""
        return tuple(one.probe for one in self._all())

    def _all(self) -> list["Watched"]:
        """Those of models that are alive, and of those that are not."""
        alive = (one for ref in self._recordings if (one := ref()) is not None)
        found = {one.folder.path: one for one in (*self._ended, *alive)}
        paths = (recorder.folder.path for recorder in self._recorders)
        return [found[path] for path in paths if path in found]

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop, write and sum up what was measured; safe to call twice."""
        global _watching
        if not self._is_open or os.getpid() != self._process:
            return
        self._is_open = False
        _watching = None if _watching is self else _watching
        self._hook.remove()
        atexit.unregister(self._at_exit)
        ENDINGS.remove(self._stop)
        for recording in self._all():
            if recording not in self._ended:
                self._retire(recording)
        self._tell_all()

    def _at_exit(self) -> None:
        """The script is over."""
        close_at_exit(self._close_as)

    def _stop(self) -> None:
        """A signal ends the process."""
        self._close_as("interrupted")

    def _close_as(self, status: str) -> None:
        self.status = self.status if status == "finished" else status
        self.close()

    def _retire(self, recording: "Watched") -> None:
        def end() -> None:
            self._ended.append(recording)
            recording.retire(self.status)

        self._safely(end)

    def _tell_all(self) -> None:
        ended = self._all()
        for recording in ended:
            for line in _told(recording, self._from):
                _say(line)
        for message in () if self._notes is None else self._notes.said:
            _note(f"note: {message}")
        if self._tells_idle and not ended and self._notes is None:
            _note(NO_STEP)
        for recording in ended:
            self._safely(recording.draw)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _speaks_for(optimizer: Optimizer) -> bool:
    """Whether this process measures: the first one, or all where each holds a part."""
    from .owners import is_sharded

    return not known_rank() or is_sharded(optimizer)


def _note(message: str) -> None:
    _say(f"wdprobe: {message}")


def _say(message: str) -> None:
    """A line on stderr, of the first process alone, in characters that it can show."""
    stream = sys.stderr
    if stream is None or known_rank():
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = message.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError, RuntimeError):  # nobody reads it, it is closed, a signal came in
        return


def _told(recording: "Watched", start: Path) -> list[str]:
    """The summary of one model for a person, who is where the script was started."""
    found, folder = recording.summary, recording.folder.path
    if not found:
        return []
    path = shlex.quote(str(folder.relative_to(start) if folder.is_relative_to(start) else folder))
    rates = found.get("rate", {}).get("mean", float("nan")), found.get("mass", {}).get("mean")
    lines = [
        "",
        f"wdprobe: {printable(found['model'])} in {printable(found['script'])}: "
        f"{counted(found['steps'], 'step')} of {found['optimizer']}",
        *(f"  {printable(one)}" for one in (*found.get("verdict", ()), *found["findings"])),
    ]
    if rates[0] == rates[0]:
        lines.append(
            f"  R_op {percent(rates[0])} of the weights, {percent(rates[1])} of what is taken off"
        )
    else:
        lines.append("  R_op is undefined: nothing decays, or no step was measured")
    return [
        *lines,
        f"  run folder: {path}",
        f"  more: wdprobe report {path}",
        f"        wdprobe dashboard {path}",
    ]
