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
