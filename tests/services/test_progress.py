import io
import sys

from wfnet.services import progress
from wfnet.services.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_BAR_SECONDS", 0.0)
    with Progress(4, "training") as bar:
        bar.set_postfix(loss="0.5")
        bar.update(2)
    shown = sys.stderr.getvalue()
    assert "training:  50%" in shown
    assert "loss=0.5" in shown
    assert "\n" not in shown


def test_a_log_gets_whole_lines_with_time_left(capsys):
    with Progress(4, "evaluating", done=1, log_seconds=0.0) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 5
    assert lines[2].startswith("evaluating:  75% 3/4 [00:00<00:00")


def test_a_short_loop_says_nothing_in_a_log_unless_its_end_is_wanted(capsys):
    for options in ({}, {"wanted": False, "leave": True}):
        with Progress(2, "evaluating", **options) as bar:
            bar.update(2)
    assert capsys.readouterr().err == ""
    with Progress(2, "untraining", leave=True) as bar:
        bar.update(2)
        bar.set_postfix(acc_r="98.0")
    first, last = capsys.readouterr().err.splitlines()
    assert "0/2" in first
    assert "2/2" in last
    assert "acc_r=98.0" in last
