"""A bar on a terminal, lines elsewhere."""

import io

from insightface_kprpe import progress
from insightface_kprpe.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    out = io.StringIO()
    for _ in Progress(range(3), desc="faces", file=out):
        pass
    lines = out.getvalue().strip().splitlines()
    assert "\r" not in out.getvalue() and len(lines) >= 3
    assert all(line.startswith("faces") for line in lines) and "3/3" in lines[-1]


def test_short_work_is_not_worth_a_line():
    out = io.StringIO()
    list(Progress(range(3), file=out, leave=False))
    assert not out.getvalue()


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    list(Progress(range(3), desc="faces"))
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()
