"""Text of others is shown as it is: no markup is read, no terminal steered, no XML broken."""

import re
import sys
import time
from xml.etree import ElementTree

import pytest
from rich.table import Table

from deltapref_jax.display import printable, xml_text
from deltapref_jax.preemption import exit_all
from deltapref_jax.progress import Counter, log, plain_console
from launch import flags

HOSTILE = "[/red] [bold \x1b[31mred\x1b[0m \x07\x9b31m :smile: \r\u202e \ud800 $x^$ <b>&"
SHOWN = r"[/red] [bold \x1b[31mred\x1b[0m \x07\x9b31m :smile: \r\u202e \ud800 $x^$ <b>&"


def test_what_steers_a_terminal_is_written_out_and_the_rest_stays():
    assert printable(HOSTILE) == SHOWN
    assert printable("naïve\t日本語\n") == "naïve\t日本語\n"


def test_a_console_shows_text_tables_and_titles_as_they_are(capsys):
    console = plain_console(width=200)
    console.print(HOSTILE)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    assert capsys.readouterr().out.count(SHOWN) == 5


def test_bars_logs_and_sentences_are_clean(capsys, monkeypatch):
    with Counter(HOSTILE, 3, "traces") as counter:
        counter.advance(1)
    log(HOSTILE, always=True)
    flags._fail(HOSTILE)
    monkeypatch.setattr("deltapref_jax.preemption.exit_process", sys.exit)
    with pytest.raises(SystemExit):
        exit_all(2, HOSTILE)
    assert capsys.readouterr().err.count(SHOWN) == 3


def test_a_log_has_a_line_every_half_minute_whatever_the_work_does(capsys, monkeypatch):
    """While nothing is done too, as when a program is compiled; what stood counts in no rate."""
    monkeypatch.setattr("deltapref_jax.progress.LOG_EVERY_SECONDS", 0.05)
    lines = []
    with Counter("sample/weak", 1000, "traces", stood=400) as counter:
        while len(lines) < 2:
            lines += capsys.readouterr().err.splitlines()
        counter.advance(100)
        while "500" not in lines[-1]:
            lines += capsys.readouterr().err.splitlines()
    assert lines[0][20:] == "sample/weak: 400 of 1,000 traces, 0.0 traces/s"
    said = re.fullmatch(
        r"sample/weak: 500 of 1,000 traces, ([\d.,]+) traces/s, \d+ s left", lines[-1][20:]
    )
    assert 0 < float(said[1].replace(",", "")) <= 100 / 0.05
    capsys.readouterr()
    with Counter("sample/weak", 1000, "traces", show=False):
        time.sleep(0.15)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", [HOSTILE, "".join(map(chr, range(0x300))), "\ufffe\U0001f600"])
def test_xml_holds_what_is_left(text):
    element = ElementTree.Element("text")
    element.text = xml_text(text)
    written = ElementTree.tostring(element, "utf-8")
    read = ElementTree.fromstring(written).text
    assert read.replace("\n", "\r") == element.text.replace("\n", "\r")
    assert xml_text("日本 \U0001f600\n\t") == "日本 \U0001f600\n\t"
