import json
import subprocess
import sys
from pathlib import Path

import pytest
from wd_probe.cli.arrival import when_loaded
from wd_probe.cli.children import watch_children

from tests.cli.test_script import WATCH, ended, start

STARTS = """
import os, subprocess, sys
import torch
import torch.distributed as dist

def work(rank, world=1):
    model = torch.nn.Linear(8, 4)
    if world > 1:
        dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meet"),
                                rank=rank, world_size=world)
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    for _ in range(3 + world):
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    if "child" in sys.argv:
        work(0)
        sys.exit(7)
    torch.multiprocessing.spawn(work, (2,), nprocs=2)
    print(subprocess.run([sys.executable, __file__, "child"]).returncode)
"""


@pytest.mark.slow
def test_spawned_processes_and_others_have_a_folder_each(tmp_path):
    """Of those that train together the first alone."""
    (tmp_path / "train.py").write_text(STARTS)
    command = [*WATCH, "--children", "--output", "mine", "train.py"]
    code, out, err = ended(start(command, tmp_path))
    assert (code, out) == (0, "7\n"), err
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("mine-p*/summary.json")]
    assert sorted(one["steps"] for one in summaries) == [4, 5]
    assert err.count("wdprobe: Linear in train.py") == 2
    assert "no optimizer step" not in err


def test_a_child_starts_as_it_would_and_the_folder_it_begins_in_is_not_seen(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('own')")
    show = "import sys, os; print(sys.path, 'wd_probe.cli.children' in sys.modules)"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shown = []
    for watched in (False, True):
        if watched:
            monkeypatch.setenv("WD_PROBE_WATCH", "")
            watch_children({"output": None, "script": "x.py"})
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
        assert done.stderr == ""
        shown.append(done.stdout)
    assert shown[0].startswith("own\n")
    assert shown[1] == shown[0].replace("False", "True")


def test_a_module_is_told_of_once_loaded_and_keeps_its_own_loader(tmp_path, monkeypatch):
    (tmp_path / "lately.py").write_text("loader = type(__spec__.loader).__name__")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_loaded("lately", lambda: seen.append(sys.modules["lately"].loader))
    assert seen == []
    import lately

    assert seen == [lately.loader] == ["SourceFileLoader"]
    assert Path(lately.__spec__.origin) == tmp_path / "lately.py"
    when_loaded("lately", lambda: seen.append("now"))
    assert seen[1:] == ["now"]
