"""The callbacks in real trainers, against the probe in a plain loop over the same batches."""

import argparse
import csv
import importlib
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import wd_probe
from wd_probe import InputError, OpposingPenaltyProbe
from wd_probe.probe.probe import METRICS

ROOT = Path(__file__).parent.parent
NAMES = tuple(METRICS)


def batches(count=8):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[: 32 * count] / 16, dtype=torch.float32)
    return DataLoader(TensorDataset(images, torch.tensor(labels[: 32 * count])), batch_size=32)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))


def adamw(model, decay=0.1):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)


def plain(*, epochs=1, accumulate=1, autocast=False, method=None):
    """A hand-written loop: its model and probe."""
    model = net()
    optimizer = adamw(model, 0 if method else 0.1)
    decay = wd_probe.WeightDecay(model, optimizer, method, rate=0.1) if method else None
    probe = OpposingPenaltyProbe(model, optimizer)
    for _ in range(epochs):
        for number, (images, labels) in enumerate(batches(), start=1):

            def closure(images=images, labels=labels):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model(images), labels)
                (loss / accumulate).backward()
                return loss

            if number % accumulate:
                closure()
            else:
                optimizer.step(closure)  # as Lightning does
                optimizer.zero_grad()
    if decay is not None:
        decay.detach()
    return model, probe


def same_records(found, expected):
    assert [record.step for record in found] == [record.step for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.names == theirs.names
        assert np.array_equal(ours.values, theirs.values)


def same_weights(found, expected):
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def hooks_of(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """What a script that trains in this way is watched to do, with no line changed."""
    from wd_probe.integrations.recording import Recording

    monkeypatch.setattr(Recording, "draw", lambda self: self.recorder.folder.close())

    def probes(train):
        with wd_probe.watch(tmp_path / "run") as watching:
            train()
        return watching.probes

    return probes


def same_total(found, expected):
    """The tensors of a record by names that end as those of the other."""
    for name, theirs in expected.tensors.items():
        ours = next(tally for own, tally in found.tensors.items() if own.endswith(name))
        assert (ours.penalized, ours.opposing) == (theirs.penalized, theirs.opposing)
    assert expected.total.opposing > 0


# --- Lightning --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pl():
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture(scope="module")
def in_lightning(pl):
    from wd_probe.integrations.lightning import OpposingPenaltyCallback

    return OpposingPenaltyCallback


def module(pl, decay=0.1):
    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def test_step(self, batch):
            self.net(batch[0])

        def configure_optimizers(self):
            return adamw(self, decay)

    return Classifier()


def gan(pl):
    class Gan(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.generator = torch.nn.Linear(8, 64)
            self.critic = torch.nn.Linear(64, 1)

        def losses(self, images, which):
            noise = torch.linspace(-1, 1, len(images) * 8).view(-1, 8)
            made = self.critic(self.generator(noise)).mean()
            return -made if which == 0 else made - self.critic(images).mean()

        def training_step(self, batch, _):
            for which, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                self.manual_backward(self.losses(batch[0], which))
                optimizer.step()

        def configure_optimizers(self):
            return [adamw(self.generator), adamw(self.critic, 0.2)]

    return Gan()


def trainer(pl, tmp_path, *callbacks, **options):
    from lightning.pytorch.loggers import CSVLogger

    options = {"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def logged(tmp_path):
    """The rows of the newest CSV log by step."""
    newest = sorted((tmp_path / "lightning_logs").glob("version_*/metrics.csv"))[-1]
    rows = csv.DictReader(newest.read_text().splitlines())
    return {int(row["step"]): {name: float(row[name]) for name in NAMES} for row in rows}


quiet_lightning = pytest.mark.filterwarnings(
    "ignore:The '(train|test)_dataloader' does not have many workers",
    "ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory .* exists and is not empty",
)


@quiet_lightning
@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"precision": "bf16-mixed"}, {"autocast": True}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    ],
    ids=["fp32", "bf16-mixed", "accumulation"],
)
def test_lightning_counts_what_a_plain_loop_counts(pl, in_lightning, tmp_path, options, loop):
    callback = in_lightning()
    measured, alone = module(pl), module(pl)
    training = trainer(pl, tmp_path, callback, **options)
    training.fit(measured, batches())
    trainer(pl, tmp_path / "alone", **options).fit(alone, batches())
    model, probe = plain(**loop)
    same_records(callback.probe.records, probe.records)
    assert callback.probe.total.total.opposing > 0
    same_weights(measured, alone)
    same_weights(measured.net, model)
    assert [row["R_op/rate"] for row in logged(tmp_path).values()] == pytest.approx(
        [record.rate for record in probe.records]
    )
    assert hooks_of(training.optimizers[0]) == 0


@quiet_lightning
def test_a_watched_script_with_lightning(pl, watched, tmp_path):
    model = module(pl)
    (probe,) = watched(lambda: trainer(pl, tmp_path).fit(model, batches()))
    same_total(probe.total, plain()[1].total)
    assert [layer.name for layer in probe.layers] == ["net.0", "net.2"]


@quiet_lightning
def test_a_watched_gan_in_lightning(pl, watched, in_lightning, tmp_path):
    callback = in_lightning()
    trainer(pl, tmp_path, callback).fit(gan(pl), batches())
    model = gan(pl)
    probes = watched(lambda: trainer(pl, tmp_path).fit(model, batches()))
    assert [probe.steps for probe in probes] == [8, 8]
    together = {**probes[0].total.tensors, **probes[1].total.tensors}
    expected = callback.probe.total.tensors
    assert together.keys() == expected.keys()
    for name, ours in together.items():
        assert ours == expected[name]


@quiet_lightning
def test_lightning_logs_the_steps_since_the_last_log(pl, in_lightning, tmp_path):
    options = {"log_every_n_steps": 3, "max_epochs": 2}
    training = trainer(pl, tmp_path, in_lightning(prog_bar=True), **options)
    training.fit(module(pl), batches())
    records = plain(epochs=2)[1].records
    counts = [record.total for record in records]

    def expected(steps):
        return sum(counts[i].opposing for i in steps) / sum(counts[i].penalized for i in steps)

    rows = logged(tmp_path)
    assert list(rows) == [2, 5, 8, 11, 14]  # an epoch has 8
    for step, row in rows.items():
        assert row["R_op/rate"] == pytest.approx(expected([step - 2, step - 1, step]))
    # the end of an epoch shows what has come since, for callbacks that monitor it
    assert training.callback_metrics["R_op/rate"].item() == pytest.approx(expected([15]))
    assert set(training.callback_metrics) == set(NAMES)
    assert set(training.progress_bar_metrics) == {"R_op/rate"}


@quiet_lightning
def test_lightning_checkpoints_can_monitor_it(pl, in_lightning, tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="R_op/rate")
    options = {"enable_checkpointing": True, "log_every_n_steps": 50}
    training = trainer(pl, tmp_path, in_lightning(), keep, **options)
    training.fit(module(pl), batches())
    total = plain()[1].total
    assert keep.best_model_score.item() == pytest.approx(total.rate)


@quiet_lightning
def test_lightning_with_several_optimizers(pl, in_lightning, tmp_path):
    callback = in_lightning()
    measured, alone = gan(pl), gan(pl)
    trainer(pl, tmp_path, callback).fit(measured, batches())
    trainer(pl, tmp_path / "alone").fit(alone, batches())
    same_weights(measured, alone)

    model = gan(pl)
    optimizers = model.configure_optimizers()
    probe = OpposingPenaltyProbe(model, optimizers)
    for images, _ in batches():
        for which, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            model.losses(images, which).backward()
            optimizer.step()
    same_weights(measured, model)
    same_records(callback.probe.records, probe.records)
    assert len(callback.probe.records) == len(logged(tmp_path)) == 8
    assert callback.probe.records[-1].penalized == 8 * 64 + 64 + 64 + 1
    assert {layer.name for layer in callback.probe.layers} == {"generator", "critic"}


@quiet_lightning
def test_lightning_decays_with_a_method_for_each_optimizer(pl, in_lightning, tmp_path):
    model = gan(pl)
    model.configure_optimizers = lambda: [adamw(model.generator, 0), adamw(model.critic, 0)]
    callback = in_lightning(method="wd", rate=0.1)
    trainer(pl, tmp_path, callback).fit(model, batches())
    assert [decay.method for decay in callback.decays] == ["wd", "wd"]
    assert callback.probe.records[-1].penalized == 8 * 64 + 64 + 64 + 1


@quiet_lightning
@pytest.mark.parametrize("method", ["wd", "lpwd"])
def test_lightning_trains_with_a_method(pl, in_lightning, tmp_path, method):
    callback = in_lightning(method=method, rate=0.1)
    measured = module(pl, decay=0)
    training = trainer(pl, tmp_path, callback)
    training.fit(measured, batches())
    model, probe = plain(method=method)
    same_weights(measured.net, model)
    same_records(callback.probe.records, probe.records)
    assert hooks_of(training.optimizers[0]) == 0


@quiet_lightning
def test_lightning_fit_twice_does_not_pile_up(pl, in_lightning, tmp_path):
    callback = in_lightning()
    training, model = trainer(pl, tmp_path, callback), module(pl)
    training.fit(model, batches())
    first = callback.probe
    training.save_checkpoint(tmp_path / "one.ckpt")
    training.test(model, batches(), ckpt_path=str(tmp_path / "one.ckpt"), verbose=False)
    training.fit_loop.max_epochs = 2
    training.fit(model, batches())
    assert callback.probe is not first
    assert [probe.steps for probe in (first, callback.probe)] == [8, 8]
    assert callback.probe.records[0].rate != first.records[0].rate


@quiet_lightning
@pytest.mark.parametrize("method", [None, "pwd"])
def test_lightning_resumes_with_every_step_counted_once(pl, in_lightning, tmp_path, method):
    decay = 0 if method else 0.1
    options = {"method": method, "rate": 0.1} if method else {}
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
    first = trainer(pl, tmp_path, in_lightning(**options), keep, enable_checkpointing=True)
    first.fit(module(pl, decay), batches())

    callback = in_lightning(**options)
    resumed = module(pl, decay)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
    more = {"enable_checkpointing": True, "max_epochs": 2}
    training = trainer(pl, tmp_path, callback, keep, **more)
    training.fit(resumed, batches(), ckpt_path=str(tmp_path / "kept/last.ckpt"))
    model, probe = plain(epochs=2, method=method)
    same_weights(resumed.net, model)
    assert callback.probe.steps == 16
    assert np.array_equal(callback.probe.total.values, probe.total.values)
    same_records(callback.probe.records, probe.records[8:])

    training.fit_loop.max_epochs = 3
    training.fit(resumed, batches())
    assert callback.probe.steps == 8


@quiet_lightning
def test_lightning_refuses_a_checkpoint_of_another_method(pl, in_lightning, tmp_path):
    first = trainer(pl, tmp_path, in_lightning())
    first.fit(module(pl), batches())
    first.save_checkpoint(tmp_path / "one.ckpt")
    callback = in_lightning(method="wd", rate=0.1)
    training = trainer(pl, tmp_path, callback, max_epochs=2)
    model = module(pl)
    model.configure_optimizers = lambda: adamw(model, 0)
    message = "trained with method=None, and the callback has method='wd'"
    with pytest.raises(InputError, match=message):
        training.fit(model, batches(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert hooks_of(training.optimizers[0]) == 0


@quiet_lightning
def test_lightning_detaches_when_training_raises(pl, in_lightning, tmp_path):
    class Breaks(pl.Callback):
        def on_train_batch_end(self, *arguments):
            if arguments[-1] == 2:
                raise RuntimeError("enough")

    callback = in_lightning()
    training = trainer(pl, tmp_path, callback, Breaks())
    with pytest.raises(RuntimeError, match="enough"):
        training.fit(module(pl), batches())
    assert callback.probe.steps == 3
    assert hooks_of(training.optimizers[0]) == 0
    assert callback.state_dict()["probe"]["steps"] == 3


@quiet_lightning
def test_lightning_finds_the_layers_of_timm(pl, in_lightning, tmp_path):
    timm = pytest.importorskip("timm")

    class Wraps(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model("test_convnext", num_classes=10, in_chans=1)

        def training_step(self, batch, _):
            images = F.interpolate(batch[0].view(-1, 1, 8, 8), size=32)
            return F.cross_entropy(self.model(images), batch[1])

        def configure_optimizers(self):
            return adamw(self)

    callback, model = in_lightning(every=2), Wraps()
    trainer(pl, tmp_path, callback).fit(model, batches(3))
    assert callback.probe.layers == wd_probe.layers(model.model)
    assert callback.probe.layers.definition == "timm"
    assert [record.step for record in callback.probe.records] == [1, 3]


def test_lightning_refuses_bad_options(in_lightning):
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        in_lightning(every=0)
    with pytest.raises(InputError, match="log_every must be at least 1, got 0"):
        in_lightning(log_every=0)
    with pytest.raises(InputError, match="rate= and scale= need a method=, such as 'wd'"):
        in_lightning(rate=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        in_lightning(evry=2)


# --- Hugging Face -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def in_transformers(hf):
    from wd_probe.integrations.transformers import OpposingPenaltyCallback

    return OpposingPenaltyCallback


def gpt2(hf, **options):
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, **sizes, **off, **ends, **options))


def text():
    """16 pieces of a docstring, as bytes."""
    raw = inspect.getdoc(argparse).encode("ascii")[: 16 * 16]
    pieces = torch.tensor(list(raw)).view(16, 16)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def hf_trainer(hf, folder, *callbacks, decay=0.1, model=None, **options):
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": decay,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    arguments = hf.TrainingArguments(str(folder), **options)

    class InOrder(hf.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    data = {"train_dataset": text(), "eval_dataset": text()[:4]}
    return InOrder(model or gpt2(hf), arguments, callbacks=list(callbacks), **data)


def test_layers_of_gpt2(hf):
    from wd_probe.integrations.transformers import blocks

    tied, untied = gpt2(hf), gpt2(hf, tie_word_embeddings=False)
    names = ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1"]
    names.append("transformer.ln_f")
    assert [layer.name for layer in blocks(tied)] == names
    assert [layer.name for layer in blocks(untied)] == [*names, "lm_head"]
    for model in (tied, untied):
        held = [name for layer in blocks(model) for name in layer.parameters]
        assert held == [name for name, _ in model.named_parameters()]
        for inputs in (None, torch.zeros(1, 4, dtype=torch.long)):
            found = [layer.name for layer in wd_probe.layers(model, inputs)]
            assert found[:2] == names[:2]
            assert [name.startswith("transformer.h.0.") for name in found[2:8]] == [True] * 6
            assert [name.startswith("transformer.h.1.") for name in found[8:14]] == [True] * 6
            assert found[14] == "transformer.ln_f"
            assert found[15:] == ([] if model is tied else ["lm_head"])


@pytest.mark.parametrize("exact", [None, True])
def test_gpt2_in_a_plain_loop_counts_tied_weights_once(hf, exact):
    model = gpt2(hf)
    optimizer = adamw(model)
    with OpposingPenaltyProbe(model, optimizer, exact=exact) as probe:
        ids = torch.stack([piece["input_ids"] for piece in text()])
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert probe.records[-1].penalized == sum(p.numel() for p in model.parameters())
    assert probe.total.tensors["transformer.wte.weight"].opposing > 0
    assert "lm_head.weight" not in probe.total.tensors


def hf_plain(hf, folder, accumulate=1, method=None):
    """A hand-written loop over the Trainer's batches, with the optimizer that it makes."""
    from wd_probe.integrations.transformers import blocks

    model = gpt2(hf)
    optimizer = hf_trainer(hf, folder, model=model, decay=0 if method else 0.1).create_optimizer()
    groups = blocks(model)
    if method:
        decay = wd_probe.WeightDecay(model, optimizer, method, rate=0.1, groups=groups)
    probe = OpposingPenaltyProbe(model, optimizer, groups=groups)
    ids = torch.stack([piece["input_ids"] for piece in text()]).view(-1, accumulate, 4, 16)
    model.train()
    for group in (*ids, *ids):
        for batch in group:
            model(batch, labels=batch, num_items_in_batch=group.numel()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if method:
        decay.detach()
    return model, probe


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [None, "lpwd"])
def test_transformers_counts_what_a_plain_loop_counts(
    hf, in_transformers, tmp_path, accumulate, method
):
    options = {"gradient_accumulation_steps": accumulate, "decay": 0 if method else 0.1}
    callback = in_transformers(method=method, rate=0.1) if method else in_transformers()
    measured = hf_trainer(hf, tmp_path, callback, **options)
    measured.train()
    model, probe = hf_plain(hf, tmp_path, accumulate, method)
    same_weights(measured.model, model)
    same_records(callback.probe.records, probe.records)
    assert len(callback.probe.records) == 8 // accumulate
    if not method:
        alone = hf_trainer(hf, tmp_path, **options)
        alone.train()
        same_weights(measured.model, alone.model)
    assert hooks_of(measured.optimizer.optimizer) == 0


def test_a_watched_script_with_transformers(hf, watched, tmp_path):
    training = hf_trainer(hf, tmp_path)
    (probe,) = watched(training.train)
    model, expected = hf_plain(hf, tmp_path, 1, None)
    same_weights(training.model, model)
    assert probe.total.tensors == expected.total.tensors
    assert "transformer.h.0" in {layer.name for layer in probe.layers}


def test_transformers_logs_land_in_history_and_in_every_integration(hf, in_transformers, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = in_transformers()
    options = {"logging_steps": 2, "report_to": "tensorboard"}
    training = hf_trainer(hf, tmp_path, callback, eval_strategy="epoch", **options)
    assert callback.add_to(training) is callback
    assert training.callback_handler.callbacks.count(callback) == 1
    training.train()

    counts = [record.total for record in callback.probe.records]
    expected = [
        sum(count.opposing for count in pair) / sum(count.penalized for count in pair)
        for pair in zip(counts[::2], counts[1::2], strict=True)
    ]
    history = [entry for entry in training.state.log_history if NAMES[0] in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]
    assert [entry["R_op/rate"] for entry in history] == expected
    assert all("loss" in entry and set(NAMES) <= set(entry) for entry in history)
    events = EventAccumulator(str(next(tmp_path.glob("runs/*"))))
    events.Reload()
    seen = events.Scalars("train/R_op/rate")
    assert [event.step for event in seen] == [2, 4, 6, 8]
    assert [event.value for event in seen] == pytest.approx(expected)


def test_transformers_resumes_with_every_step_counted_once(hf, in_transformers, tmp_path):
    whole = in_transformers()
    first = hf_trainer(hf, tmp_path, whole, save_strategy="steps", save_steps=3)
    first.train()
    saved = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    attributes = saved["stateful_callbacks"]["OpposingPenaltyCallback"]["attributes"]
    assert attributes["_loaded"]["probe"]["steps"] == 3

    for restored in (False, True):
        callback = in_transformers()
        options = {"restore_callback_states_from_checkpoint": restored}
        resumed = hf_trainer(hf, tmp_path / "more", callback, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        if restored:  # the Trainer makes a new one
            ours = resumed.callback_handler.callbacks
            (callback,) = [one for one in ours if isinstance(one, in_transformers)]
        same_weights(resumed.model, first.model)
        assert callback.probe.steps == 8
        assert np.array_equal(callback.probe.total.values, whole.probe.total.values)
        same_records(callback.probe.records, whole.probe.records[3:])

    resumed.train()
    assert callback.probe.steps == 8


def test_transformers_resumes_with_a_method(hf, in_transformers, tmp_path):
    def trained(folder, rate, checkpoint=None, **options):
        callback = in_transformers(method="pwd", rate=rate)
        training = hf_trainer(hf, folder, callback, decay=0, **options)
        training.train(resume_from_checkpoint=checkpoint)
        return training, callback

    first, whole = trained(tmp_path, 0.5, save_strategy="steps", save_steps=3)
    resumed, callback = trained(tmp_path / "more", 0.1, str(tmp_path / "checkpoint-3"))
    assert callback.decays[0].rate == 0.5  # as with an optimizer, what was saved stands
    same_weights(resumed.model, first.model)
    assert np.array_equal(callback.probe.total.values, whole.probe.total.values)


def test_transformers_joins_a_training_that_began_without_it(hf, in_transformers, tmp_path):
    hf_trainer(hf, tmp_path, save_strategy="steps", save_steps=3).train()
    callback = in_transformers()
    options = {"save_strategy": "steps", "save_steps": 6}
    resumed = hf_trainer(hf, tmp_path / "more", callback, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.probe.steps == 5
    saved = json.loads((tmp_path / "more/checkpoint-6/trainer_state.json").read_text())
    attributes = saved["stateful_callbacks"]["OpposingPenaltyCallback"]["attributes"]
    assert attributes["_loaded"]["probe"]["steps"] == 3


@pytest.mark.parametrize("method", [None, "wd"])
def test_transformers_does_not_pile_up(hf, in_transformers, tmp_path, method):
    class Breaks(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise RuntimeError("enough")

    callback = in_transformers(method=method, rate=0.1) if method else in_transformers()
    training = hf_trainer(hf, tmp_path, callback, Breaks(), decay=0 if method else 0.1)
    with pytest.raises(RuntimeError, match="enough"):
        training.train()
    assert callback.probe.steps == 2
    training.pop_callback(Breaks)
    training.train()
    assert callback.probe.steps == 8
    assert hooks_of(training.optimizer.optimizer) == 0


def test_transformers_refuses_two_decays(hf, in_transformers, tmp_path):
    training = hf_trainer(hf, tmp_path, in_transformers(method="wd", rate=0.1))
    with pytest.raises(InputError, match=r"decays by itself .* build it with weight_decay=0"):
        training.train()


# --- the package ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_extra_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"wd_probe.integrations.{name}", raising=False)
    message = f"{name.title()} is not installed; pip install 'wd-probe[{name}]'"
    with pytest.raises(ImportError, match=re.escape(message)):
        importlib.import_module(f"wd_probe.integrations.{name}")


@pytest.mark.parametrize(
    ("name", "needs"),
    [("accelerate_loop", "accelerate"), ("gpt2", "transformers"), ("timm_train", "timm")],
)
def test_examples(name, needs, capsys):
    pytest.importorskip(needs)
    runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
    assert "R_op" in capsys.readouterr().out
