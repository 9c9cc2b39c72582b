import os
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.strangers import QUICK, spoiled
from wd_probe.training.data import load_images


def test_spoiled_pictures_are_left_out(tmp_path):
    kinds = {"a.png": "PNG", "b.jpg": "JPEG", "c.gif": "GIF", "d.tif": "TIFF", "e.webp": "WEBP",
             "f.bmp": "BMP", "g.ppm": "PPM"}  # fmt: skip
    good = {}
    for name, kind in kinds.items():
        Image.effect_noise((24, 20), 50).convert("RGB").save(tmp_path / name, kind)
        good[name] = (tmp_path / name).read_bytes()
    (tmp_path / "z.png").write_bytes(good["a.png"])

    @QUICK
    @given(
        st.sampled_from(sorted(kinds)).flatmap(lambda n: st.tuples(st.just(n), spoiled(good[n])))
    )
    def check(found):
        name, content = found
        (tmp_path / name).write_bytes(content)
        images, unreadable = load_images(tmp_path, 8)
        assert len(images) + len(unreadable) == len(kinds) + 1
        (tmp_path / name).write_bytes(good[name])

    check()


def test_bombs_programs_and_pipes_among_pictures(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("1", (1, 1_000_000)).save(tmp_path / "narrow.png")
    (tmp_path / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n%%EOF\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    Image.new("RGB", (9, 9)).save(tmp_path / "z.png")
    images, unreadable = load_images(tmp_path, 224)
    assert len(images) == 1
    assert unreadable == ["bomb.png", "narrow.png", "program.png"]


def saved(folder, name, picture, **options):
    picture.save(folder / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, unreadable = load_images(folder, 8)
    (folder / name).unlink()
    assert unreadable == []
    return images[0]


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [("a.png", np.uint16, 1040), ("a.tif", np.uint16, 1040), ("a.tif", np.float32, 1 / 63),
     ("a.png", np.uint8, 4), ("a.pgm", np.uint16, 1040), ("a.tif", ">u2", 1040)],
)  # fmt: skip
def test_wide_numbers_are_scaled_by_their_range(tmp_path, name, dtype, factor):
    pixels = (RAMP * factor).astype(dtype)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
        images, _ = load_images(tmp_path, 8)
        found = images[0]
    else:
        mode = {"mode": "I;16B"} if dtype == ">u2" else {}
        found = saved(tmp_path, name, Image.frombytes("I;16B", (8, 8), pixels.tobytes())
                      if mode else Image.fromarray(pixels))  # fmt: skip
    ends = {np.float32: 255, np.uint8: 1}.get(dtype, 255 / 65535)
    expected = np.round(pixels.astype(np.float64) * ends)
    assert np.abs(found.numpy() - expected).max() <= 0.5
    assert (found == 255).float().mean() < 0.1


@pytest.mark.parametrize("pixels", [RAMP.astype(np.int32), RAMP.astype(np.float32),
                                    (RAMP - 5).astype(np.float32) / 64])  # fmt: skip
def test_numbers_of_no_known_range_are_left_out_and_counted(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "b.png")
    images, unreadable = load_images(tmp_path, 8)
    assert (len(images), unreadable) == (1, ["a.tif"])


GRAY = Image.fromarray((RAMP * 4).astype(np.uint8))


def palette(**options):
    picture = GRAY.convert("RGB").quantize(64)
    picture.info.update(options)
    return picture


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a.png", GRAY.convert("LA")),
        ("a.png", GRAY.convert("RGBA")),
        ("a.jpg", GRAY.convert("CMYK")),
        ("a.tif", GRAY.convert("CMYK")),
        ("a.png", palette()),
        ("a.png", palette(transparency=b"\x00\x80" + b"\xff" * 62)),
        ("a.gif", palette(transparency=3)),
        ("a.jpg", GRAY.convert("YCbCr")),
    ],
)
def test_every_mode_keeps_its_brightness(tmp_path, name, picture):
    found = saved(tmp_path, name, picture).float().mean(0).numpy()
    assert np.abs(found - RAMP * 4).mean() < 3
