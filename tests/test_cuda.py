"""On a GPU: the same counts as a float64 oracle, nothing changed, and the host never waiting."""

import copy
import csv
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from tests.small import FAST
from tests.training.test_checkpoint import Listener, Stopped, assert_same
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay, audit, zero_shot_decay
from wd_probe.probe.checkup import checkup, oracle
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train as train_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LR, RATE = 0.01, 0.1
C = LR * RATE


def adamw(**options):
    return lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=RATE, **options)


OPTIMIZERS = {
    "foreach": adamw(),
    "fused": adamw(fused=True),
    "single": adamw(foreach=False),
    "capturable": adamw(capturable=True),
    "tensor-lr": lambda ps: torch.optim.AdamW(
        ps, lr=torch.tensor(LR, device="cuda"), weight_decay=RATE, capturable=True
    ),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9),
}


def made(name="foreach", dtype=torch.float32, **layout):
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10).to("cuda", dtype, **layout)
    optimizer = OPTIMIZERS[name](model.parameters())
    if name == "sgd":
        WeightDecay(model, optimizer, "wd", rate=RATE)
    return model, optimizer


def backward(model, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 32, 32, generator=generator).to("cuda", dtype)
    labels = torch.randint(0, 10, (16,), generator=generator).cuda()
    F.cross_entropy(model(images).float(), labels).backward()


def train(model, optimizer, steps, *, around=None, dtype=torch.float32):
    for step in range(steps):
        backward(model, step, dtype)
        if around:
            around.before()
        optimizer.step()
        if around:
            around.after()
        optimizer.zero_grad()


class Oracle:
    """Counts each step from the weights before and after it, on the host in float64."""

    def __init__(self, model, keep="whole", c=C):
        self.named, self.keep, self.c, self.steps = dict(model.named_parameters()), keep, c, []

    def _stand(self):
        return {name: p.detach().double().cpu().flatten().numpy() for name, p in self.named.items()}

    def before(self):
        self.kept = self._stand()

    def after(self):
        self.steps.append(
            {name: oracle(self.kept[name], y, self.c, self.keep)[0]
             for name, y in self._stand().items()}
        )  # fmt: skip

    def agrees_with(self, records, *, sums=True):
        assert len(records) == len(self.steps)
        for record, tensors in zip(records, self.steps, strict=True):
            for name, row in tensors.items():
                found = record.tensors[name]
                counts = found.penalized, found.opposing, found.flipped, found.nonfinite
                assert counts == tuple(row[:4]), (record.step, name)
                if sums and self.keep == "whole":
                    xx, xd, dd = row[6:9]
                    assert found.squared == pytest.approx(xx, rel=1e-6)
                    assert found.moved == pytest.approx(dd, rel=1e-5)
                    assert found.along == pytest.approx(xd, abs=1e-6 * (xx * dd) ** 0.5)
        assert sum(row[1] for tensors in self.steps for row in tensors.values()) > 0


def test_every_kernel_is_right_and_triton_counts():
    found = checkup(torch.device("cuda", 0))
    assert found.problems() == []
    assert {one.kernel for one in found.agreement} == {"Triton"}


def test_triton_counts_as_torch_does():
    command = [sys.executable, "-m", "tests.triton_cases", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alike\n"), done.stderr


@pytest.mark.parametrize("keep", ["whole", "signs"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_real_steps_agree_with_the_oracle_on_every_weight(name, keep):
    model, optimizer = made(name)
    seen = Oracle(model, keep)
    with OpposingPenaltyProbe(model, optimizer, keep=keep) as probe:
        train(model, optimizer, 6, around=seen)
        seen.agrees_with(probe.records)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes_and_layouts(dtype):
    model, optimizer = made(dtype=dtype, memory_format=torch.channels_last)
    seen = Oracle(model)
    if dtype == torch.bfloat16:
        optimizer.param_groups[0]["weight_decay"] = 1.0  # less is lost in rounding
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 4, around=seen, dtype=dtype)
        if dtype == torch.float64:
            seen.agrees_with(probe.records)
        else:
            assert all(record.total.opposing > 0 for record in probe.records)


@pytest.mark.parametrize("keep", ["whole", "signs"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_bit_identical_with_the_probe_on_or_off(name, keep, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ends = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for probed in (False, False, True):
            model, optimizer = made(name)
            if probed:
                probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
            train(model, optimizer, 4)
            ends.append([p.detach().clone() for p in model.parameters()])
    assert len(probe.records) == 4
    assert all(map(torch.equal, ends[0], ends[1]))
    assert all(map(torch.equal, ends[0], ends[2]))


@pytest.mark.parametrize("keep", ["whole", "signs"])
@pytest.mark.parametrize("name", ["foreach", "fused", "sgd"])
def test_the_host_waits_for_no_step(name, keep):
    model, optimizer = made(name)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    train(model, optimizer, 2)
    for step in range(3):
        backward(model, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # new factors are sent
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    assert len(probe.records) == 5


def test_copies_take_a_word_or_a_byte_a_weight():
    for keep, size in (("whole", 4), ("signs", 1)):
        p = torch.nn.Parameter(torch.randn(1 << 24, device="cuda"))
        p.grad = torch.randn_like(p)
        model = torch.nn.ParameterList([p])
        optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=RATE, fused=True)
        optimizer.step()
        stood = torch.cuda.memory_allocated()
        probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
        optimizer.step()
        assert len(probe.records) == 1
        more = (torch.cuda.memory_allocated() - stood) / p.numel()
        assert size <= more < size + 0.1
        del model, optimizer, probe, p


@pytest.mark.parametrize("keep", ["whole", "signs"])
def test_writes_between_steps_are_seen(keep):
    model, optimizer = made()
    seen = Oracle(model, keep)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    for step in range(4):
        backward(model, step)
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                if k % 3 == step % 3:
                    p.mul_(-0.5)
                if k % 3 == 1:
                    p.data.neg_()  # past torch's count of versions
        seen.before()
        optimizer.step()
        seen.after()
        optimizer.zero_grad()
    seen.agrees_with(probe.records)


def test_steps_that_a_scaler_leaves_out():
    model, optimizer = made("fused")
    probe, scaler = OpposingPenaltyProbe(model, optimizer), torch.amp.GradScaler("cuda")
    for step in range(6):
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(torch.randn(16, 3, 32, 32, device="cuda")),
                                   torch.randint(0, 10, (16,), device="cuda"))  # fmt: skip
        scaler.scale(loss).backward()
        if step in (2, 4):
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [record.step for record in probe.records] == [1, 2, 4, 6]


def test_a_captured_step_is_told_and_replays_as_without_a_probe():
    ends = []
    for probed in (False, True):
        model, optimizer = made("capturable")
        if probed:
            probe = OpposingPenaltyProbe(model, optimizer)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(p.shape, generator=generator).cuda() for p in model.parameters()]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        with torch.cuda.stream(side):
            optimizer.step()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(3):
                graph.replay()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    ours = [str(one.message) for one in told if issubclass(one.category, WdProbeWarning)]
    assert len(ours) == 1
    assert "a CUDA graph replays its steps without hooks" in ours[0]
    assert all(map(torch.equal, *ends))
    assert len(probe.records) == 3  # two ahead of the capture, one after the replays


def test_a_compiled_step_and_model_agree_with_the_oracle():
    torch._dynamo.reset()
    model, optimizer = made()
    called, step = torch.compile(model), torch.compile(optimizer.step)
    seen = Oracle(model)
    probe = OpposingPenaltyProbe(called, optimizer)
    for number in range(3):
        backward(called, number)
        seen.before()
        step()
        seen.after()
        optimizer.zero_grad()
    seen.agrees_with(probe.records)


@pytest.mark.parametrize("method", ["wd", "lpwd", "pwd", "rwd", "cautious", "corrected", "l2"])
def test_methods_walk_as_on_the_cpu(method):
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        model = model.to(device, torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        WeightDecay(model, optimizer, method, rate=RATE)
        probe = OpposingPenaltyProbe(model, optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            images = torch.randn(32, 8, generator=generator, dtype=torch.float64).to(device)
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(([p.detach().cpu() for p in model.parameters()], probe.total.total))
    (weights, total), (others, other) = ends
    for one, two in zip(weights, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert (total.penalized, total.opposing) == (other.penalized, other.opposing)
    for name in ("squared", "along", "moved", "growth", "taken"):
        assert getattr(total, name) == pytest.approx(getattr(other, name), rel=1e-7, abs=1e-12)


def test_a_scan_leaves_the_weights_as_they_were():
    model, optimizer = made()
    stood = copy.deepcopy(model.state_dict())
    images = torch.randn(16, 3, 32, 32, device="cuda")
    with torch.no_grad():
        points = zero_shot_decay(model, lambda m: {"norm": m(images).norm().item()}, steps=4)
    assert len(points) == 5
    assert all(torch.equal(p, stood[name]) for name, p in model.state_dict().items())
    assert audit(optimizer).tensors[0].weight_decay == RATE


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(dtype, tmp_path):
    amp = {} if dtype is None else {"amp": True, "amp_dtype": dtype}
    options = TrainOptions(
        model="test_convnext", batch_size=32, device="cuda", lr=1e-3, recovery_interval=2,
        steps=7, every=1, train_samples=96, val_split=0.1, **amp, output=tmp_path / "whole",
    )  # fmt: skip
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        train_run(options, Listener())
        options = replace(options, output=tmp_path / "run")
        with pytest.raises(Stopped):
            train_run(options, Listener(4))
        train_run(options, Listener(), resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_commands_run_there(wdprobe, tmp_path):
    common = [*FAST, "--lr", 1e-3, "--device", "cuda", "--amp"]
    code, out, err = wdprobe("rop", *common, "--steps", 6, "--output", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 6
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["device"].startswith("cuda")
    rows = list(csv.DictReader((tmp_path / "run" / "steps.csv").open()))
    assert all(np.isfinite(float(row["balance"])) for row in rows)
    assert wdprobe("zeroshot", "--run", "run", "--steps", 3, "--num-samples", 16)[0] == 0
    assert wdprobe("report", "run")[0] == 0
