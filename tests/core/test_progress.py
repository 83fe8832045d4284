"""Where the output is no terminal, a long command says now and then how far it is."""

import pytest

from stagepatch.core import progress
from stagepatch.core.progress import progress_bar


@pytest.mark.parametrize(("seconds", "disable", "lines"), [(0.0, False, 3), (3600.0, False, 0), (0.0, True, 0)])
def test_a_plain_line_every_so_often(monkeypatch, capsys, seconds, disable, lines):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress_bar(disable=disable) as bar:
        task = bar.add_task("training", total=10, status="")
        bar.advance(task)
        bar.update(task, status="loss 0.25")
        bar.advance(task, 4)
        printed = [line for line in capsys.readouterr().out.splitlines() if "training" in line]
    assert len(printed) == lines
    assert not lines or "training 5/10, loss 0.25" in printed[-1]
