import os

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
