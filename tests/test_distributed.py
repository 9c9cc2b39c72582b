"""DDP, FSDP2 and tensor parallelism on gloo, each against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
METHODS = ["own", "wd", "rwd", "pwd", "lpwd", "l1", "l2"]
ON_TWO = [f"fsdp-{m}" for m in METHODS] + [
    "ddp-own",
    "ddp-lpwd",
    "fsdp-sgd-wd",
    "zero-own",
    "zero-lpwd",
]
ON_FOUR = ["fsdp-own", "fsdp-lpwd", "hybrid-own", "hybrid-lpwd", "ddp-own"]
FORMULAS = ["half", "tensor-parallel"]
SUMS = pytest.mark.skipif(
    torch.__version__ < (2, 9),
    reason="torch before 2.9 sums what FSDP2 should average over gloo's processes",
)


def torchrun(processes, *arguments):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, "-m", *command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def worker(processes, folder, *scenarios):
    done = torchrun(processes, "-m", "tests.distributed.worker", folder, *scenarios)
    assert done.returncode == 0, done.stderr
    return {
        (processes, name): [
            json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(processes)
        ]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def on_two(folder):
    """What every scenario came to, on every rank."""
    return worker(2, folder, *ON_TWO, *FORMULAS, "saved", "one-rank")


@pytest.fixture(scope="module")
def on_four(folder, on_two):
    return worker(4, folder, *ON_FOUR, "resumed")


def scenarios(names):
    return [
        pytest.param(name, marks=SUMS if name.startswith(("fsdp", "hybrid")) else ())
        for name in names
    ]


@pytest.mark.parametrize("name", scenarios(ON_TWO))
def test_two_processes_have_the_weights_and_counts_of_one(on_two, name):
    check(name, *on_two[2, name])


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios(ON_FOUR))
def test_four_processes_have_the_weights_and_counts_of_one(on_four, name):
    check(name, *on_four[4, name])


def check(name, first, *others):
    assert first["same weights"]
    alone, together = first["alone"], first["together"]
    assert together["layers"] == alone["layers"]
    assert together["profile"] == alone["profile"]
    for one, several in zip(alone["records"], together["records"], strict=True):
        assert list(one) == list(several)
        for tensor in one:
            assert several[tensor][:3] == one[tensor][:3]
            ledger = pytest.approx(one[tensor][3:], rel=1e-5, abs=1e-8, nan_ok=True)
            assert several[tensor][3:] == ledger
    opposing = [sum(tensor[1] for tensor in step.values()) for step in together["records"]]
    assert all(other["together"]["opposing"] == opposing for other in others)
    assert sum(opposing) > 0 or name.split("-")[-1] in ("rwd", "pwd", "lpwd")


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_are_those_of_the_whole_tensors(on_two, name):
    for rank in on_two[2, name]:
        for measured, expected in zip(rank["probe"], rank["formula"], strict=True):
            assert {tensor: numbers[:3] for tensor, numbers in measured.items()} == expected
        assert sum(tensor[1] for step in rank["probe"] for tensor in step.values()) > 0


def test_a_probe_on_one_rank_alone_is_refused_instead_of_hanging(on_two):
    message = on_two[2, "one-rank"][0]["message"]
    assert message == (
        "the parameters are spread over 2 processes, and rank 1 built no probe within 3 s; build "
        "it on every rank (its results may be read on one alone)"
    )


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_processes(on_two, on_four):
    whole, resumed = on_two[2, "saved"][0], on_four[4, "resumed"][3]
    assert resumed["weights"] == whole["weights"]
    assert resumed["steps"] == whole["steps"] == 6
    for tensor, numbers in whole["total"].items():
        assert resumed["total"][tensor][:3] == numbers[:3]
        ledger = pytest.approx(numbers[3:], rel=1e-5, abs=1e-8, nan_ok=True)
        assert resumed["total"][tensor][3:] == ledger
