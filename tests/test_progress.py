"""Progress bars: drawn on a terminal, one line per minute in a log, hidden together with log messages."""

import io
import logging

import pytest
import rich
from rich.console import Console

from tracknet import progress
from tracknet.progress import ProgressBar, quiet, track


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """Replace the console by a terminal whose output is collected."""
    file = io.StringIO()
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=file, force_terminal=True, width=100))
    return file


def test_a_bar_shows_how_much_is_done(terminal):
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_a_bar_inside_another_is_a_second_line_of_it(terminal):
    for _ in track(range(2), "outer"):
        list(track(range(2), "inner"))
    assert "outer" in terminal.getvalue() and "inner" in terminal.getvalue()
    assert progress._display is None
    list(track(range(2), "later"))
    assert "later" in terminal.getvalue()


def test_what_is_quiet_shows_no_bar_and_no_message(terminal, said):
    with quiet():
        list(track(range(2), "hidden"))
        logging.getLogger("tracknet.x").info("hidden")
        logging.getLogger("tracknet.x").warning("shown")
    assert "hidden" not in terminal.getvalue() and said == ["shown"]
    list(track(range(2), "visible"))
    assert "visible" in terminal.getvalue()


def test_a_log_gets_a_line_a_minute_with_the_time_that_is_left(monkeypatch, said):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBar("training", 10, completed=2) as bar:
        for _ in range(4):
            now[0] += 40
            bar.advance(status="loss 1.0")
    # Starting at step 2: 2 steps in 80 seconds, then 4 steps in 160 seconds, so 40 seconds per step.
    assert said == ["training: 4 of 10, about 4 min left  loss 1.0", "training: 6 of 10, about 3 min left  loss 1.0"]


def test_items_without_a_length_are_counted(terminal):
    assert list(track(iter("ab"), "reading")) == ["a", "b"]
    assert list(track(iter("ab"), "reading", 2)) == ["a", "b"]
    assert "2/2" in terminal.getvalue()


def test_what_fails_inside_ends_the_bar(terminal):
    with pytest.raises(ValueError), ProgressBar("x", 2):
        raise ValueError
    assert progress._display is None
