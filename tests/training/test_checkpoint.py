"""Runs killed at any moment and resumed, against the same runs never killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wd_probe import WdProbeWarning
from wd_probe.runs import folder as runs
from wd_probe.runs.locks import Lock
from wd_probe.runs.reading import read_run
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid
from wd_probe.training import checkpoint as recovery
from wd_probe.training.data import catalogue, held
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests/data/first_layout"
TABLES = ("steps.csv", "layers.csv", "epochs.csv", "profile.csv", "tensors.csv")

#: Runs commands, each in a child that kills itself: after a share of the calls of Python and C that
#: the first command made once training had begun, or at a place by name.
DRIVER = """
import json, os, random, signal, sys, threading, traceback
import timm, torch
from timm.models import register_model
from wd_probe.cli import progress as render, main as cli
from wd_probe.runs import figures, recorder
from wd_probe.training import checkpoint as recovery, train
from wd_probe.training.data import catalogue

torch.set_num_threads(1)
figures.draw_training = lambda run: {}  # other tests draw
whole_splits = catalogue._splits
whole_splits("digits", 32, None, False)  # kept, so that no child reads them again
catalogue._splits = lambda *named: tuple(
    (images[:count], labels[:count])
    for (images, labels), count in zip(whole_splits(*named), (200, 64))
)

@register_model
def noisy_convnext(pretrained=False, **options):
    return timm.create_model("test_convnext", drop_path_rate=0.3, drop_rate=0.2, **options)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

calls = [0]

def of(arguments):
    return arguments[-1].removesuffix("-whole") + ".calls"

def called(frame, event, argument):
    calls[0] += 1
    if calls[0] == calls[1]:
        die()

def in_a_save(whole=torch.save, left=[2]):
    def save(state, file):
        whole(state, file)
        left[0] -= 1
        if not left[0]:
            file.truncate(file.tell() // 2)
            die()
    recovery.torch.save = save

def in_an_evaluation(left=[2]):
    whole = train.evaluate
    def evaluate(*arguments):
        left[0] -= 1
        return whole(*arguments) if left[0] else die()
    train.evaluate = evaluate

def at_the_figures():
    recorder.Recorder._draw = lambda *_: die()

PLACES = {"save": in_a_save, "evaluation": in_an_evaluation, "figures": at_the_figures}

def run(arguments, moment):
    if moment in PLACES:
        PLACES[moment]()
    elif moment is not None or not os.path.exists(of(arguments)):
        calls.append(-1 if moment is None else int(moment * int(open(of(arguments)).read())))
        begin = render.TrainingProgress.started
        def started(*told):
            begin(*told)
            sys.setprofile(called)
        render.TrainingProgress.started = started
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["wdprobe", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 99
    return 0

for arguments, moment in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        code = run(arguments, moment)
        sys.setprofile(None)
        if not os.path.exists(of(arguments)):
            open(of(arguments), "w").write(str(calls[0]))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ", flush=True)
"""


def drive(folder, *runs):
    """Exit codes of commands, each a list of arguments and the moment it is killed at."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(runs)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(code) for code in done.stdout.split()], done.stderr


def events(folder):
    """Every point of every chart, in order of steps."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: sorted((event.step, event.value) for event in found.Scalars(tag))
        for tag in found.Tags()["scalars"]
    }


def assert_same(run, whole):
    """To the bit, but for time and place."""
    for name in (*TABLES, "model.safetensors", "model_ema.safetensors"):
        assert (run / name).exists() == (whole / name).exists(), name
        if (whole / name).exists():
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (json.loads((path / "summary.json").read_text()) for path in (run, whole))
    for name in ("seconds", "images_per_second", "run"):
        assert a.pop(name) != 0
        del b[name]
    assert a == b
    shown, wanted = events(run), events(whole)
    assert shown == wanted
    assert all(len(points) == len(set(points)) for points in shown.values())
    left = {path.name for path in run.iterdir()} - {path.name for path in whole.iterdir()}
    assert all(name.startswith("events.out.tfevents.") for name in left), left


# --- killed ---------------------------------------------------------------------------------------

COMMON = ["--batch-size", 32, "--lr", 1e-3, "--device", "cpu"]
RUNS = {
    "own": ["rop", "--model", "test_convnext", "--steps", 15, "--recovery-interval", 2],
    "pwd": ["train", "--model", "test_convnext", "--method", "pwd", "--opt", "momentum",
            "--epochs", 2, "--val-split", 0.1, "--both-moments", "--recovery-interval", 1],
    "lpwd": ["rop", "--model", "noisy_convnext", "--method", "lpwd", "--steps", 9, "--every", 2,
             "--recovery-interval", 3],
}  # fmt: skip
MOMENTS = {
    "own": (0.3, "save", "evaluation", "figures"),
    "pwd": (0.6,),
    "lpwd": (0.5,),
}


def killed(name, moments):
    """A run never killed, and one killed at each moment in turn; before, between, at the end."""
    command, *options = [*RUNS[name], *COMMON]
    return [
        [[command, *options, "--output", f"{name}-whole"], None],
        [[command, *options, "--output", name], moments[0]],
        *([[command, "--resume", name], moment] for moment in (*moments[1:], None)),
    ]


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driven")
    runs = [run for name, moments in MOMENTS.items() for run in killed(name, moments)]
    return folder, *drive(folder, *runs)


def test_runs_killed_at_any_moment_end_as_if_they_had_not_been(driven):
    folder, codes, err = driven
    wanted = [code for moments in MOMENTS.values() for code in (0, *[-9] * len(moments), 0)]
    assert codes == wanted, err
    for name in MOMENTS:
        assert_same(folder / name, folder / f"{name}-whole")
        config = json.loads((folder / name / "config.json").read_text())
        assert len(config.pop("resumed_at")) == len(MOMENTS[name])
        whole = json.loads((folder / f"{name}-whole/config.json").read_text())
        assert config.pop("command_line").endswith(f"--output {name}")
        assert whole.pop("command_line").endswith(f"--output {name}-whole")
        assert config == whole | {"output": name}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("seed", range(4))
def test_runs_killed_at_random_moments(name, seed, tmp_path):
    dice = random.Random(seed)
    moments = [dice.choice([dice.random() / 2, "save", "evaluation"]) for _ in range(8)]
    codes, err = drive(tmp_path, *killed(name, moments))
    whole, *again = codes
    assert (whole, again[0]) == (0, -9), err
    ended = again.index(0)  # and whatever comes later finds a finished run
    assert set(again[:ended]) == {-9}, err
    assert set(again[ended + 1 :]) <= {2}, err
    assert_same(tmp_path / name, tmp_path / f"{name}-whole")


def test_a_killed_run_of_the_first_layout_is_resumed(wdprobe, tmp_path):
    run = shutil.copytree(OLD / "killed", tmp_path / "run")
    code, out, err = wdprobe("rop", "--resume", run, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["status"], summary["steps"], summary["measured_steps"]) == ("finished", 33, 33)
    assert json.loads((run / "config.json").read_text())["resumed_at"] == [15]
    for name in ("steps", "layers", "profile", "epochs"):
        before = (OLD / f"killed/{name}.csv").read_bytes()
        after = (run / f"{name}.csv").read_bytes()
        assert after.startswith(before)
        assert len(after) > len(before)
    assert not (run / "recovery.pt").exists()
    rates = read_run(run).steps["rate"]
    assert len(rates) == 33
    assert summary["rate"]["max"] == max(rates)
    assert summary["rate"]["mean"] == pytest.approx(sum(rates) / 33)
    assert "dynamics" not in summary, "its first steps measured none"
    assert summary["verdict"] == [
        "What decay did is not told: a version that did not measure it began the run."
    ]
    code, out, err = wdprobe("report", run, "--output", tmp_path / "page.html")
    assert code == 0, err


# --- stopped in this process ----------------------------------------------------------------------


class Stopped(Exception):
    pass


class Listener:
    """Stops a run after a step, as a kill would: nothing is told to the run; below 0, as Ctrl-C."""

    def __init__(self, last=None):
        self.last, self.steps = last, []

    def started(self, *_):
        pass

    def stepped(self, step, record):
        self.steps.append(step.step)
        if step.step == self.last:
            raise Stopped
        if self.last is not None and step.step == -self.last:
            signal.raise_signal(signal.SIGINT)

    def scored(self, *_):
        pass


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train two short runs, one stopped after a step and resumed; the first steps of that."""
    digits = catalogue._splits("digits", 32, None, False)
    few = tuple(
        (images[:n], labels[:n]) for (images, labels), n in zip(digits, (96, 32), strict=True)
    )

    def train_both(stops, **chosen):
        defaults = {"model": "test_convnext", "batch_size": 32, "device": "cpu", "lr": 1e-3,
                    "recovery_interval": 2, "steps": 7, "every": 1}  # fmt: skip
        options = TrainOptions(**defaults | chosen)
        if options.dataset == "digits":
            monkeypatch.setattr(catalogue, "_splits", lambda *_: few)
        train(replace(options, output=tmp_path / "whole"), Listener())
        options, told = replace(options, output=tmp_path / "run"), []
        for number, stop in enumerate((*stops, None)):
            told.append(Listener(stop))
            try:
                train(options, told[-1], resume=number > 0)
            except Stopped:
                assert stop is not None
        assert_same(tmp_path / "run", tmp_path / "whole")
        return [listener.steps[0] for listener in told]

    return train_both


#: timm's recipe, of which every part has something to go on from; two steps are an epoch.
RECIPE = {
    "sched": "cosine", "sched_on_updates": True, "warmup_epochs": 1, "warmup_lr": 1e-4,
    "method": "lpwd", "layer_decay": 0.8, "clip_grad": 1.0, "clip_mode": "agc", "smoothing": 0.1,
    "mixup": 0.4, "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "model_ema": True,
    "model_ema_decay": 0.9, "model_ema_warmup": True, "grad_accum_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"amp": True, "amp_dtype": "float16", "method": "lpwd", "opt": "momentum"},
        {"opt": "lookahead_adamw", "method": "rwd", "channels_last": True, "both_moments": True},
        {"opt_kwargs": "fused=True amsgrad=True", "every": 0},
        RECIPE,
        RECIPE | {"method": "corrected", "sched_on_updates": False, "grad_accum_steps": 1},
        RECIPE
        | {
            "sched": "plateau",
            "sched_on_updates": False,
            "warmup_epochs": None,
            "warmup_lr": None,
            "patience_epochs": 0,
            "mixup_off_epoch": 1,
        },
        pytest.param({"torchcompile": True}, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_state_is_recovered(trained, options):
    assert trained((4, 6), **options) == [1, 3, 5]


def test_ctrl_c_at_a_step_of_a_recipe(trained):
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup
    try:
        assert trained((-3, -5), recovery_interval=100, **RECIPE) == [1, 4, 6]
    finally:
        signal.signal(signal.SIGINT, was)


# timm's folder reader leaves the files it opens to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_streamed_pictures_come_in_the_same_order_with_the_same_flips(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(held, "HELD_BYTES", 0)
    for number, (image, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        split = "train" if number < 24 else "validation"
        if label < 2 and number < 48:
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image.reshape(8, 8) * 15).astype("uint8"))
            picture.resize((32, 32)).save(folder / f"{number}.png")
    options = {"dataset": "folder", "data_dir": tmp_path, "batch_size": 2, "hflip": 0.5,
               "aa": "rand-m9-mstd0.5-inc1"}  # fmt: skip
    assert trained((7,), recovery_interval=5, steps=9, **options) == [1, 6]


# --- what is refused, and left as it is -----------------------------------------------------------

BASE = TrainOptions(
    model="test_convnext", batch_size=16, steps=6, device="cpu", method="wd", recovery_interval=2
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after its fifth step, saved after its fourth."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        train(replace(BASE, output=folder), Listener(5))
    return folder


@pytest.fixture
def run(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(stopped, "run"))


def change(path, **values):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def forge(run, **values):
    state = torch.load(run / "recovery.pt", weights_only=True)
    torch.save(state | values, run / "recovery.pt")


def link(path):
    path.replace("elsewhere")
    path.symlink_to(Path("elsewhere").absolute())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


SPOILT = {
    "run has finished; there is nothing left to resume":
        lambda run: change(run / "summary.json", status="finished"),
    "run has diverged, and would again":
        lambda run: change(run / "summary.json", status="diverged"),
    "run is no run folder: it has no config.json":
        lambda run: (run / "config.json").unlink(),
    "run/config.json is damaged":
        lambda run: (run / "config.json").write_text("{"),
    "run is no run of `wdprobe train` or `wdprobe rop`":
        lambda run: change(run / "config.json", command="zeroshot"),
    "run is a run of `wdprobe rop`; `wdprobe rop --resume run` resumes it":
        lambda run: change(run / "config.json", command="rop"),
    "run is a run of wd_probe '9', which this version cannot resume":
        lambda run: change(run / "config.json", versions={"wd-probe": "9"}),
    "run/config.json is damaged: batch_size must be":
        lambda run: change(run / "config.json", batch_size="many"),
    "run/recovery.pt is damaged or not written by wd_probe":
        lambda run: os.truncate(run / "recovery.pt", 5000),
    "run/recovery.pt is damaged or not written by wd_probe (Weights only":
        lambda run: torch.save(Evil(), run / "recovery.pt"),
    "run/recovery.pt is of another version of wd_probe":
        lambda run: forge(run, format=0),
    "run/recovery.pt is of another run: seed 0 there and 1 here":
        lambda run: change(run / "config.json", seed=1),
    "run/recovery.pt does not fit this run: its model cannot be recovered":
        lambda run: forge(run, parts=torch.load(run / "recovery.pt")["parts"] | {"model": {}}),
    "run is damaged: ../victim is missing":
        lambda run: forge(run, sizes={"../victim": 0}),
    "run/steps.csv is damaged: it is shorter than it was at the last save":
        lambda run: os.truncate(run / "steps.csv", 3),
    "run/steps.csv is not a plain file; it is left alone":
        lambda run: link(run / "steps.csv"),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOILT)
def test_what_cannot_be_resumed_is_refused_and_left_alone(run, wdprobe, message):
    Path("victim").write_text("whole")
    SPOILT[message](run)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code, out, err = wdprobe("train", "--resume", run)
    assert (code, out) == (2, "")
    assert f"wdprobe: error: {message}" in err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert not Path("executed").exists()


def test_another_option_beside_resume_is_refused(run, wdprobe):
    code, _, err = wdprobe("train", "--resume", run, "--device", "cpu", "--lr", 1, "--amp")
    assert code == 2
    assert "--resume takes every option from run/config.json; leave out --lr, --amp" in err


def test_one_process_at_a_time(run, wdprobe):
    with Lock(run):
        code, _, err = wdprobe("train", "--resume", run)
    assert code == 2
    assert "another process is writing to run; let it end first (process " in err


def test_a_run_that_was_never_saved_begins_anew(run, wdprobe):
    (run / "recovery.pt").unlink()
    assert wdprobe("train", "--resume", run)[0] == 0
    train(replace(BASE, output=Path("whole")), Listener())
    assert_same(run, Path("whole"))


def test_an_interrupted_run_says_how_it_goes_on(run, wdprobe, monkeypatch):
    train(replace(BASE, output=Path("whole")), Listener())

    class Interrupting(Listener):
        def stepped(self, step, record):
            raise KeyboardInterrupt

    told = "wd_probe.cli.progress.TrainingProgress.stepped"
    with monkeypatch.context() as patch:
        patch.setattr(told, Interrupting.stepped)
        code, _, err = wdprobe("train", "--resume", run)
    assert code == 130
    assert err.splitlines()[-2:] == [
        "interrupted after step 5; what was measured is kept, and this goes on from its last save:",
        "wdprobe train --resume run",
    ]
    assert (run / "model.safetensors").exists()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert wdprobe("train", "--resume", run)[0] == 0
    assert_same(run, Path("whole"))


def test_a_state_that_cannot_be_kept_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "state_dict", lambda self: {"state": {0: object()}})
    with pytest.warns(WdProbeWarning, match="cannot be resumed if it is killed: optimizer") as told:
        summary = train(replace(BASE, output=tmp_path / "run"), Listener())
    assert len(told) == 1
    assert summary["status"] == "finished"


def test_short_runs_are_not_saved_and_long_ones_once_a_minute(tmp_path, monkeypatch):
    saved, now = [], [0.0]
    monkeypatch.setattr(recovery.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(recovery.Recovery, "_save", lambda self, step: saved.append(step))
    folder = runs.RunFolder(tmp_path / "run")
    often = recovery.Recovery(folder, {}, {}, None, lambda: None)
    for step in range(1, 1001):
        now[0] += 0.25
        often.offer(step)
    assert saved == [240, 480, 720, 960]
    for interval, wanted in ((0, []), (400, [400, 800])):
        saved.clear()
        kept = recovery.Recovery(folder, {}, {}, interval, lambda: None)
        for step in range(1, 1001):
            kept.offer(step)
        assert saved == wanted
    folder.close()


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_broken_cell_goes_on_where_it_was_saved(stopped, tmp_path, monkeypatch):
    (cell,) = grid.grid(BASE, {"seed": [0]})
    own = tmp_path / cell.name
    shutil.copytree(stopped, own)
    (own / "incomplete").touch()
    began = []
    offer = recovery.Recovery.offer
    monkeypatch.setattr(
        recovery.Recovery, "offer", lambda self, step: began.append(step) or offer(self, step)
    )
    assert sweeps.run_cell(cell, tmp_path)["status"] == "finished"
    assert began[0] == 5
    train(replace(BASE, output=tmp_path / "whole"), Listener())
    assert_same(own, tmp_path / "whole")

    shutil.rmtree(own)
    shutil.copytree(stopped, own)
    os.truncate(own / "recovery.pt", 5000)
    began.clear()
    assert sweeps.run_cell(cell, tmp_path)["status"] == "finished"
    assert began[0] == 1
    assert_same(own, tmp_path / "whole")

    shutil.rmtree(own)
    shutil.copytree(stopped, own)
    before = {path: path.read_bytes() for path in own.iterdir()}
    with Lock(own):
        summary = sweeps.run_cell(cell, tmp_path)
    assert summary["status"] == "failed"
    assert "another process is writing" in summary["error"]
    assert {path: path.read_bytes() for path in own.iterdir()} == before
