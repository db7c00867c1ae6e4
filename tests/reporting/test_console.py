"""Messages reach the console as they are."""

import logging

from tracknet.reporting.console import configure_logging, echo


def test_messages_are_printed_as_they_are_and_once(capsys):
    configure_logging()
    configure_logging()
    logging.getLogger("tracknet.data.x").info("[red]a\x1b[0m :smile:")
    logging.getLogger("tracknet.data.x").debug("hidden")
    echo("[b]c[/b]")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("[red]a") and "\x1b" not in lines[0] and lines[1] == "[b]c[/b]"
    assert ":smile:" in lines[0]


def test_long_messages_are_not_broken(capsys):
    configure_logging()
    logging.getLogger("tracknet").warning("word " * 100)
    assert len(capsys.readouterr().out.rstrip("\n").splitlines()) == 1
