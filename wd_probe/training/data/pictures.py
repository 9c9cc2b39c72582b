"""Pictures without labels, from any folder."""

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Their decoders, and no others: PIL would run Ghostscript on a PostScript file of any name.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


def load_images(folder: Path, img_size: int, most: int | None = None) -> tuple[Tensor, list[str]]:
    """Every picture below a folder: resized by the shorter side, center-cropped.

    Args:
        folder: looked through with all its subfolders.
        img_size: side of the square.
        most: take no more than so many, in the order of their names.

    Returns:
        uint8 (N, 3, img_size, img_size), and the names of files that look like pictures but cannot
        be read; those are left out.

    Raises:
        InputError: no such folder, or no readable picture in it.
    """
    from PIL import Image
    from torchvision.transforms import v2

    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    prepare = v2.Compose([v2.Resize(img_size), v2.CenterCrop(img_size), v2.PILToTensor()])
    pictures: list[Tensor] = []
    unreadable: list[str] = []
    found = (p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
    for path in sorted(found):
        if most is not None and len(pictures) >= most:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=_FORMATS) as picture:
                    resized = img_size**2 * max(picture.size) / min(picture.size)
                    if resized > (Image.MAX_IMAGE_PIXELS or math.inf):
                        raise ValueError("too narrow")
                    pictures.append(prepare(picture.convert("RGB")))
        except Exception:  # a decoder raises what it likes over bytes it does not understand
            unreadable.append(str(path.relative_to(folder)))
    if not pictures:
        raise InputError(
            f"image folder {folder} holds no readable picture"
            + (f" ({len(unreadable)} unreadable, {unreadable[0]} first)" if unreadable else "")
        )
    return torch.stack(pictures), unreadable
