import os
import sys

from wd_probe.cli import console as render

from wd_probe import WdProbeWarning


def test_names_are_text_on_a_terminal_too(capsys, tmp_path, monkeypatch):
    console = render.PrintableConsole(force_terminal=True, width=200, highlight=False)
    console.print("a\x1b]0;title\x07b\x9b31m[bold]c[/] \u202e", markup=True)
    shown = capsys.readouterr().out
    assert "a\\x1b]0;titleb\\x9b31m" in shown
    assert "\x1b[1mc" in shown
    assert "\\u202e" in shown
    monkeypatch.setattr(render, "err", render.PrintableConsole(stderr=True, width=200))
    monkeypatch.setattr("warnings.showwarning", None)
    render.show_warnings()
    sys.modules["warnings"].showwarning(WdProbeWarning("x\x1b[2J\n[red]y"), WdProbeWarning, "", 0)
    assert capsys.readouterr().err == "wdprobe: warning: x\\x1b[2J\\n[red]y\n"


def test_a_folder_with_a_strange_name(wdprobe, tmp_path):
    folder = tmp_path / os.fsdecode(b"a\x1b[2J\n\xff[red]")
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    for arguments in (["report", folder], ["zeroshot", "--run", folder]):
        code, out, err = wdprobe(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "\\x1b[2J\\n\\udcff[red]/config.json is damaged" in err
