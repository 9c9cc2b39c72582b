"""An Accelerate loop with the probe: scikit-learn's digits, two epochs, gradient accumulation.

python docs/examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wd_probe


def main() -> wd_probe.OpposingPenaltyProbe:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    probe = wd_probe.OpposingPenaltyProbe(model, optimizer)  # after prepare()

    for epoch in range(2):
        for batch, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(batch), target))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: R_op {probe.records[-1].rate:.3%} of the last step")

    accelerator.print(f"R_op {probe.total.rate:.3%} over {probe.steps} optimizer steps")
    probe.close()
    return probe


if __name__ == "__main__":
    main()
