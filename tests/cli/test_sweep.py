import pytest

from tests.small import rows
from tests.sweeps.conftest import TINY


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_fits_the_screen(wdprobe, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("wd_probe.cli.console.out._width", columns)
    code, out, _ = wdprobe(
        "sweep", "--model", "convnext_tiny,swin_tiny_patch4_window7_224", "--opt", "adam,momentum",
        "--dataset", "digits,torch/fashion_mnist", "--method", "baseline,wd,lpwd",
        "--weight-decay", "0.01,0.001", "--seeds", "2",
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert (
        sum("lpwd" in line and "0.001" in line and "99.41 ± 6.28 %" in line for line in lines) == 8
    )
    assert ("validation" in out) == (columns == 160)


def test_more_options_of_the_optimizer_are_an_axis_too(quick, wdprobe, tmp_path, monkeypatch):
    monkeypatch.setattr("wd_probe.cli.console.out._width", 80)
    (tmp_path / "grid.toml").write_text(
        'method = "wd"\nopt_kwargs = ["", "fused=True betas=(0.8,0.9) eps=1e-6"]\n'
    )
    code, out, _ = wdprobe("sweep", "grid.toml", "--output", "s")
    assert code == 0
    assert "R_op" in out  # the last column
    found = {r["opt_kwargs"]: r["cell"] for r in rows(tmp_path / "s/cells.csv")}
    assert set(found) == {"", "fused=True betas=(0.8,0.9) eps=1e-6"}
    assert len(set(found.values())) == 2


FILES = {
    "key.toml": "weight_decya = 0.1\n",
    "kind.toml": 'lr = ["fast"]\n',
    "whole.yaml": "steps: 2.5\n",
    "flag.yaml": "amp: 1\n",
    "choice.yaml": "scale: max3\n",
    "text.yaml": "model: [3]\n",
    "broken.toml": "lr = [1\n",
    "broken.yaml": "lr: [1\n",
    "list.yaml": "- 1\n",
    "grid.json": "{}",
    "none.yaml": "lr: []\n",
}


#: What was wrong: the arguments, what the one line says.
BAD = {
    "empty list": (["--lr", ""], "the grid is empty: lr has no values"),
    "no seeds": (["--seeds", "0"], "the grid is empty: seed has no values"),
    "number": (["--lr", "1e-3,fast"], "lr must be a number, got 'fast'"),
    "method": (["--method", "wd,lwpd"], "unknown method 'lwpd'; choose from own, baseline"),
    "opt": (["--opt", "adam,adammw"], "unknown optimizer 'adammw'; did you mean"),
    "model": (["--model", "test_convnext,test_convnxt"], "unknown model 'test_convnxt'"),
    "dataset": (["--dataset", "digits,torch/cifar10", "--data-dir", "."], "dataset 'torch/cifar10' cannot be read from ."),  # noqa: E501
    "too strong": (["--method", "wd,lpwd", "--weight-decay", "1,7", "--lr", "0.1"], "lpwd with rate 7 would take off 1.4 times layer 11"),  # noqa: E501
    "many": (["--seeds", "10001"], "the grid has 10,001 cells; --yes runs them all the same"),
    "very many": (["--seeds", "1000000000", "--lr", "1,2"], "the grid has 2,000,000,000 cells"),
    "output": (["--output", "file/run"], "output folder file/run cannot be written to (Not a directory)"),  # noqa: E501
    "resources": (["--cpus-per-cell", "2"], "--cpus-per-cell and --gpus-per-cell need --ray"),
    "cpus": (["--ray", "--cpus-per-cell", "0"], "--cpus-per-cell must be at least 1, got 0"),
    "gpus": (["--ray", "--gpus-per-cell", "-1"], "--gpus-per-cell must be a finite number ≥ 0"),
    "no file": (["nothing.toml"], "grid nothing.toml cannot be read (No such file or directory)"),
    "suffix": (["grid.json"], "grid.json is no grid: its name must end in .toml, .yaml or .yml"),
    "key": (["key.toml"], "grid key.toml: unknown key 'weight_decya'; did you mean weight_decay"),
    "kind": (["kind.toml"], "grid kind.toml: lr must be a number, got 'fast'"),
    "whole": (["whole.yaml"], "grid whole.yaml: steps must be a whole number, got 2.5"),
    "flag": (["flag.yaml"], "grid flag.yaml: amp must be true or false, got 1"),
    "choice": (["choice.yaml"], "grid choice.yaml: scale must be one of eq9, max2, mean,"),
    "text": (["text.yaml"], "grid text.yaml: model must be a text, got 3"),
    "toml": (["broken.toml"], "grid broken.toml is damaged: "),
    "yaml": (["broken.yaml"], "grid broken.yaml is damaged: while parsing a flow sequence"),
    "list": (["list.yaml"], "grid list.yaml must hold keys and values"),
    "empty in file": (["none.yaml"], "the grid is empty: lr has no values"),
    "address": (["--ray-address", "somewhere"], "unknown Ray address 'somewhere'; use HOST:PORT"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_before_the_first_cell(wdprobe, tmp_path, case):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "file").write_text("")
    arguments, message = BAD[case]
    code, out, err = wdprobe("sweep", *TINY, *arguments)
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not list(tmp_path.glob("**/config.json"))
