"""Answers cut into rounds: nothing of the text is lost, and accepted tokens are told from the target's own."""

import io

import pytest

from outpace.cli import render
from outpace.engine import Output, Round, Stats


def output(rounds, text):
    tokens = tuple(token for one in rounds for token in one.tokens)
    return Output(text, tokens, (0,), "length", tuple(rounds), Stats(), "path")


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_segments_join_to_the_text_and_know_who_spoke():
    rounds = [Round((97, 98, 99), 2, 2, 2), Round((100,), 0, 3, 3), Round((101, 102), 1, 1, 1)]
    parts = render.segments(output(rounds, "abcdef"), decode)
    assert [(p.text, p.round_index, p.accepted) for p in parts] == [
        ("ab", 0, True),
        ("c", 0, False),
        ("d", 1, False),
        ("e", 2, True),
        ("f", 2, False),
    ]


def test_a_character_of_several_tokens_stays_whole():
    first, second = "é".encode()
    parts = render.segments(output([Round((97, first), 1, 1, 1), Round((second, 98), 1, 1, 1)], "aéb"), decode)
    assert "".join(p.text for p in parts) == "aéb"


def test_a_stop_string_is_cut_off():
    parts = render.segments(output([Round((97, 98), 1, 1, 1), Round((99,), 0, 0, 0)], "a"), decode)
    assert [p.text for p in parts] == ["a"]


@pytest.mark.parametrize("terminal", [True, False])
def test_colour_only_on_a_terminal(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout", stream)
    on = render.console()
    render.show_rounds([render.Segment("ab", 0, True), render.Segment("c [d]", 0, False)], on)
    shown = stream.getvalue()
    assert ("\x1b[" in shown) is terminal
    assert ("«ab»c [d]" in shown) is not terminal
