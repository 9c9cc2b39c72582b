"""What measuring R_op costs: against the bytes it moves, in a training step, beside its peers."""

import statistics
import time
from contextlib import contextmanager, nullcontext

import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.timing import alternate, header, milliseconds, ratio, row
from wd_probe import OpposingPenaltyProbe, WeightDecay
from wd_probe.probe import checkup, kernel
from wd_probe.training.data import load_data

KEPT = ("whole", "signs")


def side_of(name):
    """The images' side: 32, or what is next below it and in whole patches."""
    return 28 if "patch14" in name else 32


def built(name):
    size = {"img_size": side_of(name)} if name.startswith(("vit", "swin")) else {}
    return timm.create_model(name, num_classes=10, **size)


# --- the bytes ------------------------------------------------------------------------------------


def floor(name, rounds, device):
    """The probe's own work against floor A: read θ, write the copy, read the copy and θ'."""
    torch.manual_seed(0)
    stands = [p.detach() for p in built(name).to(device).parameters()]
    away = [p + 1e-4 * torch.randn_like(p) for p in stands]
    times = alternate(checkup.sides(stands, away), rounds, device)
    passes, kernel.cpu.passes = kernel.cpu.passes, lambda: None
    try:
        plain = checkup.sides(stands, away)
        plain = {side: plain[side] for side in (checkup.FLOOR, "keep whole")}
        without = alternate(plain, max(3, rounds // 3), device, warm_up=1)
    finally:
        kernel.cpu.passes = passes
    weights = sum(p.numel() for p in stands)
    header(f"the probe's own work, {name}, {weights / 1e6:.1f} M float32 weights", "words a weight",
           "ms", "of floor A")  # fmt: skip
    for side, words in checkup.WORDS.items():
        of_floor = "" if side == checkup.FLOOR else f"{ratio(times, side, checkup.FLOOR):.2f}"
        row(side, words, f"{milliseconds(times, side):.2f}", of_floor)
    row("keep whole, no C compiler", "", f"{milliseconds(without, 'keep whole'):.1f}",
        f"{ratio(without, 'keep whole', checkup.FLOOR):.2f}")  # fmt: skip


# --- a training step ------------------------------------------------------------------------------


@contextmanager
def attached(probe):
    """The probe at work, for a while; it finds the weights written since."""
    probe._hooks |= {watched: probe._attach(watched) for watched in probe._watched}
    yield
    probe.flush()
    detach(probe)


def detach(probe):
    for watched in probe._watched:
        probe._hooks.pop(watched).remove()


class Step:
    """Two training steps, or ten on a GPU, with any instrument attached for as long as one call.

    Calls return the seconds that the optimizer and what is hooked to it took on the host in all
    but the first.
    """

    def __init__(self, name, batch, device, momentum=None):
        torch.manual_seed(0)
        self.model = built(name).to(device)
        weights = self.model.parameters()
        if momentum is None:
            self.optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01)
        else:
            self.optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=momentum)
            self.decay = WeightDecay(self.model, self.optimizer, "wd", rate=0.01)
        side = side_of(name)
        self.count = 10 if device.type == "cuda" else 2
        self.images = torch.randn(batch, 3, side, side, device=device)
        self.labels = torch.randint(0, 10, (batch,), device=device)

    def __call__(self, flush=lambda: None):
        taken = 0.0
        for number in range(self.count):
            F.cross_entropy(self.model(self.images), self.labels).backward()
            begun = time.perf_counter()
            self.optimizer.step()
            taken += (time.perf_counter() - begun) * (number > 0)
            self.optimizer.zero_grad()
        begun = time.perf_counter()
        flush()
        return taken + time.perf_counter() - begun

    def probed(self, **options):
        probe = OpposingPenaltyProbe(self.model, self.optimizer, **options)
        probe._missing.remove()  # the other sides step without it
        detach(probe)

        def step():
            with attached(probe):
                return self(probe.flush)

        return step

    def hooked(self, before=None, after=None):
        def step():
            handles = []
            if before is not None:
                handles.append(self.optimizer.register_step_pre_hook(lambda *_: before(self.model)))
            handles.append(self.optimizer.register_step_post_hook(lambda *_: after(self.model)))
            taken = self()
            for handle in handles:
                handle.remove()
            return taken

        return step


def instrumented(step, sides, rounds, device):
    """Milliseconds of the plain step, and of each side what its instrument adds, with two ratios.

    What is added is timed where the instruments work, in the optimizer's step: the passes through
    the model vary from call to call by more. The second ratio is that of whole steps. On a GPU,
    which runs behind the host, whole steps give all three.
    """
    sides = {"plain": step, **sides}
    parts = {name: [] for name in sides}

    def noting(name):
        return lambda: parts[name].append(sides[name]())

    times = alternate({name: noting(name) for name in sides}, rounds, device, warm_up=2)
    whole, found = milliseconds(times, "plain") / step.count, {}
    for name in list(sides)[1:]:
        measured = ratio(times, name, "plain")
        pairs = zip(parts[name][2:], parts["plain"][2:], strict=True)
        more = 1e3 * statistics.median(one - plain for one, plain in pairs)
        if device.type == "cuda":
            more = (measured - 1) * whole
        found[name] = more, 1 + more / whole, measured
    return whole, found


def steps(names, batches, rounds, device):
    header("training step at 32×32, probed at every step", "plain, ms", *COLUMNS)
    for name in names:
        for batch in batches:
            timed_step(f"{name}, batch {batch}", Step(name, batch, device), rounds, device)


COLUMNS = (*(f"keep {kept}: ms more, ratio" for kept in KEPT), "whole steps, keep whole")


def timed_step(title, step, rounds, device):
    sides = {kept: step.probed(keep=kept) for kept in KEPT}
    whole, found = instrumented(step, sides, rounds, device)
    cells = [f"{found[kept][0]:.1f}, {found[kept][1]:.3f}" for kept in KEPT]
    row(title, f"{whole:.0f}", *cells, f"{found['whole'][2]:.3f}")


def large(rounds, device):
    """A model of 1.0 B weights; by SGD with momentum, since Adam's state and a copy are 20 GB."""
    name, batch = "vit_giant_patch14_224", 4
    header("training step at 28×28, SGD with momentum, wd", "plain, ms", *COLUMNS)
    step = Step(name, batch, device, momentum=0.9)
    weights = sum(p.numel() for p in step.model.parameters())
    timed_step(f"{name}, {weights / 1e9:.2f} B, batch {batch}", step, rounds, device)


def exactness(epochs, device):
    """What signs alone count otherwise: two probes on the same steps on digits."""
    data = load_data("digits", batch_size=64, img_size=32, device=device, seed=0)
    makers = {
        "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.05),
        "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.05, fused=True),
        "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    }
    header("test_convnext on digits", "penalized weights, all steps", "opposing",
           "keep signs: more", "c/2 of them")  # fmt: skip
    for name, make in makers.items():
        torch.manual_seed(0)
        model = built("test_convnext").to(device)
        optimizer = make(model.parameters())
        rate = optimizer.defaults["weight_decay"]
        if not rate:
            rate = 0.02
            WeightDecay(model, optimizer, "wd", rate=rate)
        whole, signs = (OpposingPenaltyProbe(model, optimizer, keep=kept) for kept in KEPT)
        for _ in range(epochs):
            for images, labels in data.train:
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        one, other = whole.total.total, signs.total.total
        assert one.penalized == other.penalized
        half = optimizer.param_groups[0]["lr"] * rate / 2
        row(name, f"{one.penalized:,}", f"{one.opposing:,}", other.opposing - one.opposing,
            f"{half * one.opposing:.1f}")  # fmt: skip


# --- peers ----------------------------------------------------------------------------------------


def norms(model):
    """Gradient and weight norms, one `.item()` a tensor, as per-layer monitors log them."""
    for p in model.parameters():
        p.grad.norm().item()
        p.detach().norm().item()


def histograms(model):
    """A histogram of every gradient, as `wandb.watch` makes."""
    for p in model.parameters():
        flat = p.grad.detach().flatten()
        torch.histc(flat, bins=64, min=flat.min().item(), max=flat.max().item()).tolist()


class UpdateSize:
    """Cockpit's cheapest look at steps: ‖θ' − θ‖ of each tensor, from a clone of the weights."""

    def __init__(self):
        self.kept = []

    def before(self, model):
        self.kept = [p.detach().clone() for p in model.parameters()]

    def after(self, model):
        for p, kept in zip(model.parameters(), self.kept, strict=True):
            (p.detach() - kept).norm(2).item()


def peers(name, batch, rounds, device):
    step, size = Step(name, batch, device), UpdateSize()
    sides = {
        "wd_probe, keep whole": step.probed(),
        "wd_probe, keep signs": step.probed(keep="signs"),
        "update sizes, as Cockpit's UpdateSize": step.hooked(size.before, size.after),
        "norms, one .item() a tensor": step.hooked(None, norms),
        "gradient histograms, as wandb.watch": step.hooked(None, histograms),
    }
    whole, found = instrumented(step, sides, rounds, device)
    header(f"instrument at every step of {whole:.0f} ms, {name}, batch {batch}", "ms more", "ratio",
           "whole steps")  # fmt: skip
    for side, (more, share, measured) in found.items():
        row(side, f"{more:.1f}", f"{share:.3f}", f"{measured:.3f}")


# --- growth ---------------------------------------------------------------------------------------


class Tensors(nn.Module):
    """So many tensors of one size; steps without a forward pass."""

    def __init__(self, count, size, device):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(size, device=device) for _ in range(count))
        for p in self.weights:
            p.grad = torch.randn_like(p)


def growth(rounds, device, quick=False):
    header("AdamW's step alone, fused", "weights", "step, ms", "probe, ms", "probe, ns a weight")
    shapes = [(1, 1_000_000), (10, 1_000_000), (100, 1_000_000), (100, 10_000), (1000, 10_000),
              (5000, 1_000)]  # fmt: skip
    for count, size in shapes[:2] + shapes[3:4] if quick else shapes:
        model = Tensors(count, size, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        probe = OpposingPenaltyProbe(model, optimizer)
        detach(probe)

        def ten(optimizer=optimizer):
            for _ in range(10):
                optimizer.step()

        def probed(probe=probe, ten=ten):
            with attached(probe):
                ten()

        times = alternate({"plain": ten, "probed": probed}, rounds, device)
        plain = milliseconds(times, "plain") / 10
        more = milliseconds(times, "probed") / 10 - plain
        row(f"{count:,} tensors of {size:,}", f"{count * size / 1e6:.0f} M",
            f"{plain:.1f}", f"{more:.1f}",
            f"{1e6 * more / (count * size):.2f}")  # fmt: skip


def every(name, batch, rounds, device):
    header(f"{name}, batch {batch}, measured", "ratio over 10 steps")
    step = Step(name, batch, device)
    probes = {f"every {n}": OpposingPenaltyProbe(step.model, step.optimizer, every=n) for n in (1, 2, 10)}  # noqa: E501  # fmt: skip
    for probe in probes.values():
        detach(probe)

    def ten(probe=None):
        def steps():
            with attached(probe) if probe is not None else nullcontext():
                for _ in range(10):
                    step()

        return steps

    sides = {"plain": ten(), **{title: ten(probe) for title, probe in probes.items()}}
    times = alternate(sides, rounds, device, warm_up=1)
    for title in probes:
        row(title, f"{ratio(times, title, 'plain'):.3f}")
