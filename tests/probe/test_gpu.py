"""What counts on a GPU, as far as it can be tried without one."""

import os
import subprocess
import sys

import pytest
import torch

from wd_probe.probe.kernel import gpu
from wd_probe.probe.sums import RAW

pytest.importorskip("triton")

COMPILES = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wd_probe.probe.kernel import gpu, triton_passes as passes

def compiled(function, kinds, **constants):
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, kinds, constants)
    return compile(source, GPUTarget("cuda", {capability}, 32), dict(enable_fp_fusion=False))

addresses = dict.fromkeys(("kept", "now", "sizes", "tensors"), "*i64")
for dtype in (tl.float32, tl.bfloat16):
    both = dict(DTYPE=dtype, BLOCK=gpu._BLOCK, TILE=gpu._TILE)
    done = compiled(passes.count, addresses | dict(factors="*fp64", found="*fp64"),
                    WIDE=tl.float32, **both)
    assert len(done.asm["cubin"])
    assert ("ld.global.v4.b32" if dtype == tl.float32 else "ld.global.v") in done.asm["ptx"]
    for run in (passes.compare, passes.renew):
        assert len(compiled(run, addresses | dict(stale="*i32", turn="i32"), **both).asm["cubin"])
    assert len(compiled(passes.keep_signs, dict(addresses), **both).asm["cubin"])
    assert len(compiled(passes.count_signs, addresses | dict(found="*fp64"), **both).asm["cubin"])
done = compiled(passes.fold, dict(found="*fp64", begins="*i64", sums="*fp64"), TILE=64)
assert len(done.asm["cubin"])
"""


def run(*command, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_counts_as_torch_does_in_its_interpreter():
    assert run("-m", "tests.triton_cases", TRITON_INTERPRET="1") == "alike\n"


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_triton_compiles_for_gpus_and_reads_four_weights_at_a_time(capability, tmp_path):
    code = COMPILES.replace("{capability}", str(capability))
    run("-c", code, TRITON_CACHE_DIR=str(tmp_path))


def test_a_cpu_needs_no_passes_for_a_gpu():
    kept = "kernel.Kept([torch.ones(3)], False, [None])"
    counted = f"{kept}.count(sums.Factors(numpy.zeros(1, int), [0.1], [False])).shape[0]"
    imported = "'wd_probe.probe.kernel.triton_passes' in sys.modules"
    loaded = "import numpy, sys, torch; from wd_probe.probe import kernel, sums"
    code = f"{loaded}; print({counted}, {imported})"
    assert run("-c", code) == "1 False\n"


def test_where_triton_fails_torch_counts(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(gpu, "Whole", broken)
    gpu._is_right.cache_clear()
    try:
        assert not gpu._is_right(torch.device("cpu"))
    finally:
        gpu._is_right.cache_clear()


def test_what_counts_wrongly_is_not_used(monkeypatch):
    zeros = torch.zeros(2, len(RAW), dtype=torch.float64)
    monkeypatch.setattr(gpu.Whole, "__init__", lambda *_: None)
    monkeypatch.setattr(gpu.Whole, "count", lambda *_: zeros)
    gpu._is_right.cache_clear()
    try:
        assert not gpu._is_right(torch.device("cpu"))
    finally:
        gpu._is_right.cache_clear()
