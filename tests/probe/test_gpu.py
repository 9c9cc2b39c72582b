"""What counts on a GPU, as far as it can be tried without one."""

import os
import subprocess
import sys

import pytest
import torch

from wd_probe.probe.kernel import gpu

pytest.importorskip("triton")

COMPILES = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.benchmarks import triton_steps
from wd_probe.probe.kernel import gpu, triton_passes as passes

def compiled(function, kinds, **constants):
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, kinds, constants)
    return compile(source, GPUTarget("cuda", {capability}, 32), dict(enable_fp_fusion=False))

addresses = dict.fromkeys(("befores", "afters", "squares", "sizes", "tensors"), "*i64")
numbers = dict(factors="*fp64", moves="*fp32", found="*fp64")
for before, moved in ((tl.float32, False), (tl.bfloat16, False), (tl.float32, True)):
    done = compiled(
        passes.count, addresses | numbers, BEFORE=before, AFTER=tl.float32, WIDE=tl.float32,
        MOVED=moved, LINED_UP=True, BLOCK=gpu._BLOCK, TILE=gpu._TILE,
    )
    assert len(done.asm["cubin"]) and "ld.global.v4.b32" in done.asm["ptx"]
    assert "fma" not in done.asm["ptx"]
done = compiled(
    triton_steps.update, dict.fromkeys(("theta", "grad", "first", "second"), "*fp32")
    | dict(weights="i32", rate="fp32", root="fp32", c="fp32", found="*fp64"),
    ADAM=True, COUNT=True, BLOCK=triton_steps.BLOCK, TILE=triton_steps.TILE,
)
assert len(done.asm["cubin"])
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


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_for_gpus_and_reads_four_weights_at_a_time(capability, tmp_path):
    code = COMPILES.replace("{capability}", str(capability))
    run("-c", code, TRITON_CACHE_DIR=str(tmp_path))


def test_a_cpu_needs_no_passes_for_a_gpu():
    counted = "kernel.Tallying([torch.ones(3)], [-torch.ones(3)])([0.1])[0, 1].item()"
    imported = "'wd_probe.probe.kernel.triton_passes' in sys.modules"
    code = f"import sys, torch; from wd_probe.probe import kernel; print({counted}, {imported})"
    assert run("-c", code) == "3.0 False\n"


def test_where_triton_fails_torch_counts(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(gpu, "Tally", broken)
    gpu._is_right.cache_clear()
    try:
        assert not gpu._is_right(torch.device("cpu"))
    finally:
        gpu._is_right.cache_clear()


def test_what_counts_wrongly_is_not_used(monkeypatch):
    zeros = torch.zeros(2, 6, dtype=torch.float64)
    monkeypatch.setattr(gpu, "Tally", lambda befores, afters: lambda c: zeros)
    gpu._is_right.cache_clear()
    try:
        assert not gpu._is_right(torch.device("cpu"))
    finally:
        gpu._is_right.cache_clear()
