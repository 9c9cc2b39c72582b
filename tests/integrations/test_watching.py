import copy
import gc
import json
import pickle
import signal
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import wd_probe
from tests.small import LR, RATE, Oracle, Silent, adamw, batch, loss_of, rows, small, train
from wd_probe.integrations import ending, recording
from wd_probe.integrations import watched as watched_room
from wd_probe.integrations import watching as watching_room
from wd_probe.runs.reading import read_run
from wd_probe.training.options import ZeroshotOptions
from wd_probe.training.scan import scan


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures are drawn where a test asks for them."""
    draw = recording.Recording.draw
    monkeypatch.setattr(recording.Recording, "draw", lambda self: self.recorder.folder.close())
    return draw


@pytest.fixture
def watch(tmp_path, capsys):
    """Starts a watch that is closed at the end; ``said()`` is what stderr has had since."""
    open_ones = []

    def start(**options):
        open_ones.append(wd_probe.watch(tmp_path / "run", **options))
        return open_ones[-1]

    start.said = lambda: capsys.readouterr().err
    yield start
    for one in open_ones:
        one.close()


def watched(oracle, probe):
    """Whether the probe has counted what the oracle has, tensor by tensor, over all steps."""
    total = probe.total.tensors
    for name in oracle.named:
        for count in ("penalized", "opposing", "flipped"):
            assert getattr(total[name], count) == sum(s[name][count] for s in oracle.steps), name
    assert sum(t["opposing"] for step in oracle.steps for t in step.values()) > 0
    return True


def trained(steps=8, model=None, optimizer=None, oracle=None):
    """A model trained with an oracle beside it."""
    model = small() if model is None else model
    optimizer = adamw(model.parameters()) if optimizer is None else optimizer
    oracle = oracle or Oracle(model.named_parameters())
    train(model, optimizer, steps, oracle.before, oracle.after)
    return model, optimizer, oracle


@pytest.mark.figures
def test_a_run_folder_as_rop_writes_it(watch, undrawn, tmp_path, monkeypatch):
    monkeypatch.setattr(recording.Recording, "draw", undrawn)
    with watch() as watching:
        _, optimizer, oracle = trained(20)
    assert watched(oracle, watching.probes[0])
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "steps.csv", "layers.csv", "tensors.csv", "summary.json"} <= files
    assert {path.stem for path in (tmp_path / "run/figures").iterdir()} >= {"rop_over_steps"}
    told = rows(tmp_path / "run/steps.csv")
    assert [int(row["opposing"]) for row in told] == [
        sum(t["opposing"] for t in step.values()) for step in oracle.steps
    ]
    assert {float(row["lr"]) for row in told} == {LR}
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["command"], summary["method"], summary["optimizer"]) == ("watch", "wd", "AdamW")
    assert (summary["lr"], summary["weight_decay"], summary["steps"]) == (LR, RATE, 20)
    said = watch.said()
    for line in (
        "20 steps of AdamW",
        "R_op ",
        f"wdprobe report {tmp_path}/run",
        "wdprobe dashboard",
    ):
        assert line in said
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    from wd_probe.report.page import report

    assert report([tmp_path / "run"])["runs"][0]["trouble"] is None
    page = (tmp_path / "run/report.html").read_text()
    assert summary["verdict"][0] in watch.said() + said
    assert "top-1" not in page.split("<script")[0].split("<h3>")[0]
    with pytest.raises(wd_probe.InputError, match="is of a script, whose model is not kept"):
        scan(ZeroshotOptions(run=tmp_path / "run", output=tmp_path / "scan"), Silent())


def test_weights_are_those_of_a_training_that_is_not_watched(watch):
    bare = trained(10)[0]
    with watch():
        torch.manual_seed(0)
        seen = trained(10)[0]
    assert all(
        torch.equal(*pair) for pair in zip(bare.parameters(), seen.parameters(), strict=True)
    )


def test_a_script_that_goes_elsewhere_leaves_its_run_where_it_was_started(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with wd_probe.watch("run"):
        monkeypatch.chdir("there")
        trained(2)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2
    assert not any((tmp_path / "there").iterdir())
    assert "more: wdprobe report run\n" in capsys.readouterr().err


def test_several_models_of_one_script(watch, tmp_path):
    with watch() as watching:
        oracles = [trained(k)[2] for k in (3, 4, 5)]
    assert all(map(watched, oracles, watching.probes))
    assert [probe.steps for probe in watching.probes] == [3, 4, 5]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["run", "run-2", "run-3"]


def test_an_optimizer_that_replaces_another_goes_on_in_its_folder(watch):
    with watch() as watching:
        model, first, oracle = trained(5)
        gone = weakref.ref(first)
        _, second, _ = trained(5, model, adamw(model.parameters()), oracle)
        del first
        gc.collect()
        assert gone() is None
        trained(2, model, second, oracle)
    assert len(watching.probes) == 1
    assert watching.probes[0].steps == 12
    assert watched(oracle, watching.probes[0])


def test_optimizers_by_turns_over_the_same_weights(watch):
    with watch() as watching:
        model, first, oracle = trained(2)
        second = adamw(model.parameters())
        for one in (second, first, second, first, first):
            trained(2, model, one, oracle)
    assert watched(oracle, watching.probes[0])


def test_two_optimizers_of_one_model_are_one_round(watch):
    model = small()
    first, second = (adamw([p for p in model.parameters() if (p.ndim > 1) == k]) for k in (1, 0))
    oracle = Oracle(model.named_parameters())
    with watch() as watching:
        for step in range(6):
            loss_of(model, step).backward()
            oracle.before()
            first.step()
            second.step()
            oracle.after()
            model.zero_grad()
    (probe,) = watching.probes
    assert probe.steps == 6
    assert watched(oracle, probe)


def test_a_muon_beside_an_adamw_and_a_schedule_that_begins_at_0(watch, tmp_path):
    model = small()
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == k] for k in (1, 0))
    muon = torch.optim.SGD(matrices, lr=LR, momentum=0.9, weight_decay=RATE)
    beside = torch.optim.AdamW(others, lr=1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(muon, 1e-6, 1.0, total_iters=4)
    with watch():
        for step in range(5):
            loss_of(model, step).backward()
            muon.step()
            beside.step()
            schedule.step()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["opt"] == summary["optimizer"] == "SGD and AdamW"
    assert (config["weight_decay"], summary["method"]) == (RATE, "l2")
    assert config["lr"] == summary["lr"] == pytest.approx(LR / 2, rel=0.01)
    told = [float(row["lr"]) for row in rows(tmp_path / "run/steps.csv")]
    assert told == pytest.approx([LR * k / 4 for k in range(5)], abs=LR * 1e-5)


def test_a_gan_has_a_folder_for_each_of_its_two_models(watch):
    gan = nn.ModuleDict({"generator": small(), "discriminator": small()})
    optimizers = {name: adamw(part.parameters()) for name, part in gan.items()}
    oracles = {name: Oracle(part.named_parameters(f"{name}")) for name, part in gan.items()}
    with watch() as watching:
        for step in range(9):
            name = "generator" if step % 3 == 0 else "discriminator"
            loss_of(gan[name], step).backward()
            oracles[name].before()
            optimizers[name].step()
            oracles[name].after()
            gan.zero_grad()
    assert [probe.steps for probe in watching.probes] == [3, 6]
    assert all(map(watched, oracles.values(), watching.probes))


def test_models_that_a_script_lets_go_of_are_freed(watch):
    with watch() as watching:
        freed, oracles = [], []
        for _ in range(3):
            model, optimizer, oracle = trained(4)
            freed += [weakref.ref(model), weakref.ref(optimizer)]
            oracles.append(Oracle({}, 0))
            oracles[-1].steps, oracles[-1].named = oracle.steps, dict.fromkeys(oracle.named)
            del model, optimizer, oracle
            gc.collect()
        assert [one() for one in freed] == [None] * 6
    assert all(map(watched, oracles, watching.probes))
    assert watch.said().count("4 steps of AdamW") == 3


def test_a_scripts_thousand_models_are_not_all_kept(watch, tmp_path, monkeypatch):
    monkeypatch.setattr(watching_room, "_MOST", 2)
    with watch():
        for _ in range(4):
            trained(1)
    assert len(list(tmp_path.iterdir())) == 2
    assert watch.said().count("2 models are measured already") == 2  # once, and at the end


class Sam(torch.optim.Optimizer):
    """As its public implementations are: it climbs, comes back, and has another one step."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        kept = [p.clone() for group in self.param_groups for p in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, old in zip(params, kept, strict=True):
            p.copy_(old)
        self.base_optimizer.step()


def accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def lookahead(optimizer):
    from timm.optim import Lookahead

    return Lookahead(optimizer, k=100)


@pytest.mark.parametrize("wrap", [accelerated, lookahead])
def test_wrappers_leave_the_step_to_the_one_inside(watch, wrap):
    model = small()
    with watch() as watching:
        _, _, oracle = trained(6, model, wrap(adamw(model.parameters())))
    assert watched(oracle, watching.probes[0])
    assert watching.probes[0].steps == 6


def test_sam_is_counted_where_the_inner_one_steps(watch):
    model = small()
    sam = Sam(model.parameters(), torch.optim.AdamW, lr=LR, weight_decay=RATE)
    oracle = Oracle(model.named_parameters())
    with watch() as watching:
        for step in range(6):

            def closure(step=step):
                model.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            closure()
            oracle.before()
            sam.step(closure)
            oracle.after()
    (probe,) = watching.probes
    assert probe.steps == 6
    assert watched(oracle, probe)


def test_an_optimizer_for_every_tensor_stepping_in_the_backward_pass(watch):
    model = small()
    optimizers = {p: adamw([p]) for p in model.parameters()}
    oracle = Oracle(model.named_parameters())

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with watch() as watching:
        for number in range(6):
            oracle.before()
            loss_of(model, number).backward()
            oracle.after()
    (probe,) = watching.probes
    assert probe.steps == 6
    assert watched(oracle, probe)


def test_an_average_of_the_model_changes_nothing(watch):
    model = small()
    average = torch.optim.swa_utils.AveragedModel(model)
    oracle = Oracle(model.named_parameters())

    def after():
        oracle.after()
        average.update_parameters(model)

    with watch() as watching:
        train(model, adamw(model.parameters()), 5, oracle.before, after)
    assert watched(oracle, watching.probes[0])
    assert len(watching.probes) == 1


def test_loss_scaling_that_leaves_steps_out(watch):
    model = small()
    optimizer, scaler = adamw(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    oracle = Oracle(model.named_parameters())
    with watch() as watching:
        for step in range(8):
            scaler.scale(loss_of(model, step)).backward()
            if step == 3:
                model[0].weight.grad[0, 0] = torch.inf
            oracle.before()
            scaler.step(optimizer)
            scaler.update()
            if step != 3:
                oracle.after()
            optimizer.zero_grad()
    assert watched(oracle, watching.probes[0])
    assert watching.probes[0].steps == 7


@pytest.mark.parametrize("what", ["model", "step", "both"])
def test_compiled(watch, what):
    torch._dynamo.reset()
    model = small()
    optimizer = adamw(model.parameters())
    oracle = Oracle(model.named_parameters())
    called = torch.compile(model, backend="eager") if what != "step" else model
    step = torch.compile(optimizer.step, backend="eager") if what != "model" else optimizer.step
    with watch() as watching:
        for number in range(5):
            loss_of(called, number).backward()
            oracle.before()
            step()
            oracle.after()
            optimizer.zero_grad()
    (probe,) = watching.probes
    assert probe.steps == 5
    assert watched(oracle, probe)


def test_float16_copies_and_loose_tensors(watch):
    loose = [torch.randn(16, 8, requires_grad=True), torch.randn(4, 16, requires_grad=True)]
    oracle = Oracle({"group0.0": loose[0], "group0.1": loose[1]})
    optimizer = adamw(loose)
    with watch() as watching:
        for number in range(5):
            images, labels = batch(number)
            logits = (images @ loose[0].T).tanh() @ loose[1].T
            nn.functional.cross_entropy(logits, labels).backward()
            oracle.before()
            optimizer.step()
            oracle.after()
            optimizer.zero_grad()
    assert watched(oracle, watching.probes[0])


def test_layers_that_are_trained_later_are_named(watch, tmp_path):
    with watch() as watching:
        model = small()
        oracle = Oracle(model.named_parameters())
        optimizer = adamw(model[2].parameters())
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": list(model[0].parameters())})
            loss_of(model, step).backward()
            oracle.before()
            optimizer.step()
            oracle.after()
            optimizer.zero_grad()
    read = read_run(tmp_path / "run")
    assert read.layer_names == ("2", "0")
    assert [layer["name"] for layer in read.summary["layers"]] == ["2", "0"]
    assert read.layers["index"][:2] == [1, 1]
    assert set(read.layers["index"]) == {1, 2}
    assert read.config["weights"] == sum(p.numel() for p in model.parameters())
    late = watching.probes[0].total.tensors["0.weight"]
    assert late.opposing == sum(step["0.weight"]["opposing"] for step in oracle.steps[2:]) > 0


def test_other_threads(watch):
    done = []

    def run():
        done.append(trained(5)[2])

    with watch() as watching:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for one in threads:
            one.start()
            one.join()
    assert all(map(watched, done, watching.probes))
    again = pickle.loads(pickle.dumps(watching.probes))
    assert [probe.total for probe in again] == [probe.total for probe in watching.probes]


def test_a_signal_waits_until_what_was_measured_is_written(watch, monkeypatch):
    ended = []
    with watch() as watching:
        trained(2)
        with monkeypatch.context() as patch:
            patch.setattr(watching, "close", lambda: ended.append("written"))
            patch.setattr(ending.os, "kill", lambda *_: ended.append("killed"))
            watching._safely(lambda: (signal.raise_signal(15), ended.append("busy")))
    assert ended == ["busy", "written", "killed"]


def test_what_cannot_be_measured_is_said_once_and_at_the_end_and_raises_nothing(watch):
    model = small()
    optimizer = torch.optim.LBFGS(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch():
            for step in range(3):
                optimizer.step(lambda step=step: loss_of(model, step))
            said = watch.said()
            assert said.count("LBFGS") == 2
    assert watch.said().startswith("wdprobe: note: the steps of LBFGS")


def test_measuring_that_fails_ends_no_training(watch, monkeypatch):
    def fails(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(recording.Recorder, "step", fails)
    monkeypatch.setattr(recording, "_SECONDS", 0)
    with watch():
        trained(3)
    assert watch.said().count("no room") == 2


def test_steps_that_go_into_a_cuda_graph_read_nothing_back(watch, monkeypatch):
    """Capturing itself needs a GPU."""
    monkeypatch.setattr(recording, "_SECONDS", 0)
    model = small()
    optimizer, late = adamw(model.parameters()), adamw(small().parameters())
    with watch() as watching:
        train(model, optimizer, 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(watched_room._Probe, "drain", lambda self: pytest.fail("read"))
            train(model, optimizer, 2)
            train(small(), late, 2)
    assert len(watching.probes) == 1
    assert "CUDA graph" in watch.said()


def test_no_step_is_told_in_one_line(watch):
    with watch():
        small()
    assert watch.said() == f"wdprobe: {watching_room.NO_STEP}\n"


def test_a_second_call_ends_the_first_and_bad_input_is_refused(tmp_path):
    with wd_probe.watch(tmp_path / "first") as first:
        trained(2)
        with wd_probe.watch(tmp_path / "second") as second:
            model, optimizer, _ = trained(3)
        train(model, optimizer, 2)
    assert [one.steps for one in (*first.probes, *second.probes)] == [2, 3]
    for options, message in (
        ({"every": 0}, "every"),
        ({"keep": "all"}, "keep"),
        ({"output": tmp_path / "first"}, "holds a run"),
    ):
        with pytest.raises(wd_probe.InputError, match=message):
            wd_probe.watch(**options)


def test_measuring_every_so_many_steps(watch, tmp_path):
    model = small()
    with watch(every=3, keep="signs") as watching:
        trained(10, model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1))
    assert watching.probes[0].steps == 10
    assert [row["step"] for row in rows(tmp_path / "run/steps.csv") if row["rate"]] == [
        "1", "4", "7", "10",
    ]  # fmt: skip


def test_copies_of_a_watched_optimizer_are_not_tied_to_it(watch):
    with watch() as watching:
        model, optimizer, _ = trained(2)
        again = copy.deepcopy((model, optimizer))
        del again
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        trained(2, model, optimizer)
    assert watching.probes[0].steps == 4
