import json

import pytest


def test_layers_command(wdprobe):
    code, out, _ = wdprobe("layers", "--model", "convnext_tiny", "--json")
    result = json.loads(out)
    assert code == 0
    assert (len(result["layers"]), result["definition"]) == (20, "timm")
    assert result["layers"][-1]["rate"] == pytest.approx(0.02)
    assert sum(layer["weights"] for layer in result["layers"]) == result["weights"] == 28589128
    code, out, _ = wdprobe("layers", "--model", "test_vit", "--filter-bias-and-bn")
    assert code == 0
    assert "n = " in out
    code, out, _ = wdprobe("layers", "--model", "convnext_tiny", "--weight-decay", 0.3, "--json")
    found = json.loads(out)
    rates = [found["mean_rate"], *(layer["rate"] for layer in found["layers"])]
    assert [float(f"{rate:.12g}") for rate in rates] == rates


def test_timescales(wdprobe):
    given = ("--lr", 1e-3, "--weight-decay", 0.05, "--filter-bias-and-bn")
    code, out, _ = wdprobe("layers", "--model", "test_vit", *given, "--steps", 100, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["lr"], result["steps"]) == (1e-3, 100)
    last = result["layers"][-1]
    assert last["timescale_steps"] == pytest.approx(1 / (1e-3 * 0.1))
    assert last["remaining"] == pytest.approx((1 - 1e-4) ** 100)
    code, out, _ = wdprobe("layers", "--model", "test_vit", *given, "--json")
    assert json.loads(out)["layers"][0]["remaining"] is None
    code, out, _ = wdprobe("layers", "--model", "test_vit", "--json")
    assert json.loads(out)["layers"][0]["timescale_steps"] is None
    code, out, err = wdprobe("layers", "--model", "test_vit", "--steps", 3)
    assert code == 2
    assert "--steps needs --lr" in err


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_of_timescales(wdprobe, monkeypatch, width):
    from wd_probe.cli import console

    monkeypatch.setattr(console.out, "_width", width)
    code, out, _ = wdprobe("layers", "--lr", 1e-4, "--steps", 88, "--filter-bias-and-bn")
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    words = " ".join(out.split())
    assert "1/(ηλ) is 1,000,000 steps: 88 steps would take 0.0088 % off" in words
    assert "4,896 0.001 10,000,000 0.00088 % 1 of 4" in words
