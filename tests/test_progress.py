"""How progress is shown: bars on a terminal, a few lines in a log, and once for all processes of a run."""

import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from test_house import ROOT
from transformers.utils import logging

import data.progress
from data.progress import progress, quiet_libraries
from fms_spec.transformers_backend import quiet

COUNT = "from data.progress import progress\nfor _ in progress(range(400), desc='count', mininterval=0): pass"


def test_in_a_log_progress_is_a_line_at_the_beginning_and_one_in_the_end(capsys):
    with progress(total=300, desc="train", unit="step") as bar:
        for step in range(300):
            bar.set_postfix({"loss": f"{step}"}, refresh=False)
            bar.update()
    said = capsys.readouterr().err
    first, last = said.splitlines()
    assert "\r" not in said and first.startswith("train:") and "0/300" in first
    assert "300/300" in last and "loss=299" in last and "step/s" in last


def test_in_a_log_what_takes_long_tells_of_itself_now_and_then_and_what_is_soon_over_does_not(capsys, monkeypatch):
    assert list(progress(range(300), desc="pack", leave=False)) == list(range(300)) and capsys.readouterr().err == ""
    monkeypatch.setattr(data.progress, "EVERY", 0)
    for leave in (True, False):
        list(progress(range(5), desc="pack", leave=leave))
        assert {f"{count}/5" for count in range(1, 5)} <= set(capsys.readouterr().err.split())


def test_of_several_processes_the_first_shows_its_progress(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    list(progress(range(300), desc="train"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    list(progress(range(300), desc="train"))
    assert "300/300" in capsys.readouterr().err


def test_on_a_terminal_there_is_one_bar_that_is_drawn_again_and_again():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", COUNT], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    said = ""
    with suppress(OSError):  # which a terminal that nobody writes to any more ends with
        while part := os.read(ours, 10**5):
            said += part.decode(errors="replace")
    os.close(ours)
    assert process.wait() == 0
    assert said.count("\r") > 5 and said.count("\n") == 1 and "█" in said


@pytest.fixture
def shown():
    logging.enable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_other_packages_draw_no_bars_in_a_log_not_even_after_a_model_was_loaded(shown, monkeypatch):
    for package in ("HF_HUB", "HF_DATASETS"):
        monkeypatch.setenv(f"{package}_DISABLE_PROGRESS_BARS", "1")
    with quiet():
        pass
    assert logging.is_progress_bar_enabled()
    quiet_libraries()
    with quiet():
        pass
    assert not logging.is_progress_bar_enabled()
