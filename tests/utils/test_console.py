import io
import re
import sys

import pytest

from diffusion_nft.utils import console
from diffusion_nft.utils.console import LOGGER, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_have_time_rank_and_level(capsys, monkeypatch):
    LOGGER.info("alone")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    LOGGER.warning("of many")
    alone, of_many = capsys.readouterr().err.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{stamp} INFO alone", alone)
    assert re.fullmatch(f"{stamp} rank 3 WARNING of many", of_many)


@pytest.mark.parametrize(
    ("interval", "options", "expected"),
    [
        (0.0, {}, ["2/3", "3/3"]),
        (60.0, {}, []),
        (60.0, {"outer": True}, ["3/3"]),
        (0.0, {"enabled": False}, []),
    ],
)
def test_progress_without_a_terminal_is_a_line_per_interval(
    interval, options, expected, capsys, monkeypatch
):
    monkeypatch.setattr(console, "INNER_INTERVAL_S", interval)
    with Progress("epochs", 3, done=1, **options) as progress:
        for reward in (0.1, 0.2):
            progress.update(1, reward=reward)
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"epochs: (\d/\d) ", line) for line in lines] == [[n] for n in expected]
    assert all(", reward=0." in line for line in lines)


def test_a_log_line_is_written_above_the_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("epochs", 4, outer=True), Progress("images drawn", 8):
        LOGGER.info("evaluated")
    pieces = re.split(r"[\r\n]", terminal.getvalue())
    (line,) = [piece for piece in pieces if "evaluated" in piece]
    assert line.endswith(" INFO evaluated") and "epochs" not in line
    assert "epochs:   0%" in terminal.getvalue() and "images drawn:   0%" in terminal.getvalue()
