"""A small GPT-2 trained from scratch on Python's own documentation: R_op of every block.

python docs/examples/gpt2.py
"""

import inspect
import statistics
import string
import textwrap

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import wd_probe
from wd_probe.integrations.transformers import blocks

LENGTH = 64


def documentation() -> torch.Tensor:
    """The docstrings of a few modules, byte by byte."""
    members = [
        member
        for module in (string, textwrap, statistics)
        for member in (module, *vars(module).values())
        if inspect.ismodule(member) or inspect.isclass(member) or inspect.isfunction(member)
    ]
    text = "\n".join(filter(None, map(inspect.getdoc, members)))
    return torch.tensor(list(text.encode("ascii", "ignore")))


def main(steps: int = 30) -> wd_probe.OpposingPenaltyProbe:
    torch.manual_seed(0)
    text = documentation()
    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    probe = wd_probe.OpposingPenaltyProbe(model, optimizer, groups=blocks(model))

    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - LENGTH, (16,))
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.2f}, R_op {probe.records[-1].rate:.3%}")

    print(f"{len(text):,} characters; R_op over all steps {probe.total.rate:.3%}")
    for layer in probe.total.layers:
        print(f"{layer.index:>2}  {layer.name:<16} {layer.rate:.3%}")
    probe.close()
    return probe


if __name__ == "__main__":
    main()
