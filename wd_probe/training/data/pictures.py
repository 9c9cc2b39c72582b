"""Pictures without labels, from any folder."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Their decoders, and no others: PIL would run Ghostscript on a PostScript file of any name.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


def as_rgb(picture: Any) -> Any:
    """A PIL picture in 8-bit RGB; wider numbers are scaled by the range that its file has.

    Raises:
        ValueError: integers of 32 bits, or floats that do not lie in [0, 1]: their range is
            unknown; or a mode that PIL does not convert.
        OSError: it cannot be decoded.
    """
    from PIL import Image

    is_wide = picture.mode == "I" and picture.format in ("PNG", "PPM")  # as older PIL opens them
    if picture.mode.startswith("I;16") or is_wide:
        pixels = np.asarray(picture, dtype=np.float64) / 257
    elif picture.mode == "F":
        pixels = 255 * np.asarray(picture, dtype=np.float64)
        if not (pixels.min() >= 0 and pixels.max() <= 255):
            raise ValueError("floats outside of [0, 1]")
    elif picture.mode == "I":
        raise ValueError("integers of 32 bits")
    else:
        if picture.mode in ("PA", "La", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    return Image.fromarray(pixels.round().astype(np.uint8)).convert("RGB")


class ReadAsRgb:
    """A reader of timm's whose files PIL makes RGB of without cutting wide numbers off."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """As the reader's; raises OSError where the picture cannot be read."""
        from PIL import Image

        file, *rest = self._reader[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = Image.open(file)
                if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
                    file.seek(0)
                    return file, *rest
                plain = io.BytesIO()
                as_rgb(picture).save(plain, "PNG")
        except ValueError as error:
            raise OSError(str(error)) from error
        plain.seek(0)
        return plain, *rest

    def __len__(self) -> int:
        return len(self._reader)

    def __getattr__(self, name: str) -> Any:
        if name == "_reader":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self._reader, name)


def load_images(folder: Path, img_size: int, most: int | None = None) -> tuple[Tensor, list[str]]:
    """Every picture below a folder: resized by the shorter side, center-cropped.

    Args:
        folder: looked through with all its subfolders.
        img_size: side of the square.
        most: take no more than so many, in the order of their names.

    Returns:
        uint8 (N, 3, img_size, img_size), and the names of files that look like pictures but cannot
        be read, or whose numbers have no known range; those are left out.

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
                    pictures.append(prepare(as_rgb(picture)))
        except Exception:  # a decoder raises what it likes over bytes it does not understand
            unreadable.append(str(path.relative_to(folder)))
    if not pictures:
        raise InputError(
            f"image folder {folder} holds no readable picture"
            + (f" ({len(unreadable)} unreadable, {unreadable[0]} first)" if unreadable else "")
        )
    return torch.stack(pictures), unreadable
