"""The training loop of timm's train.py with the probe: two lines, marked "wd_probe".

Its parts are timm's: model, mixup, loss, optimizer, scheduler stepped at every update, model EMA,
gradient clipping, autocast. The data are scikit-learn's digits.

python docs/examples/timm_train.py
"""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad

import wd_probe
from wd_probe.training.data import load_data


def validate(model: torch.nn.Module, loader: object) -> float:
    model.eval()
    top1 = AverageMeter()
    with torch.no_grad():
        for images, labels in loader:
            top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def main(epochs: int = 2) -> wd_probe.OpposingPenaltyProbe:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data("digits", batch_size=64, img_size=32, device=device, seed=0)
    model = timm.create_model("test_convnext", num_classes=data.num_classes).to(device)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-4,
        step_on_epochs=False,
        updates_per_epoch=len(data.train),
    )
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=data.num_classes)
    train_loss = SoftTargetCrossEntropy()
    ema = ModelEmaV3(model, decay=0.99)

    probe = wd_probe.OpposingPenaltyProbe(model, optimizer)  # wd_probe

    updates = 0
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for images, labels in data.train:
            images, targets = mixup(images, labels)
            with torch.autocast(device.type, torch.bfloat16):
                loss = train_loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
            optimizer.step()
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(updates, metric=loss.item())
            losses.update(loss.item(), len(images))
        top1 = validate(ema.module, data.test)
        print(f"epoch {epoch}: loss {losses.avg:.3f}, top-1 of the EMA {top1:.1f} %")
        scheduler.step(epoch + 1)

    print({layer.name: f"{layer.rate:.3%}" for layer in probe.total.layers})  # wd_probe
    print(f"R_op {probe.total.rate:.3%} over {probe.steps} steps")
    probe.close()
    return probe


if __name__ == "__main__":
    main()
