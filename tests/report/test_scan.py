import pytest

from tests.pages import written


def test_a_scan(folders, tmp_path):
    shown = written([folders / "scan"], tmp_path)
    assert shown.figures == ["Zero-shot decay", "One part decayed at a time", "Feature distortion"]
    assert "half-life" in shown.text
    assert [float(r["scale"]) for r in shown.data["zeroshot.csv"]] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0]
    )
    assert "head" in {row["name"] for row in shown.data["zeroshot_by_part.csv"]}
