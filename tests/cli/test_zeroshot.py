from pathlib import Path

import pytest
from wd_probe.cli.zeroshot import show_comparison


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_models_are_compared_the_most_robust_first(capsys, unknown):
    lives = {"a": 0.5, "b": unknown, "c": 0.9, "d": 0.0, "e": 0.2}
    show_comparison(
        [{"model": m, "source": "run", "half_life": life} for m, life in lives.items()], Path("s")
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines if "·" in line] == ["d", "e", "a", "c", "b"]
