"""Every program ends in one line when a signal comes while it imports what it needs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from wan.utils.signals import GO_ON

PROGRAMS = sorted({*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")} - {ROOT / "setup.py"})
DELAYS = (0.05, 0.2, 0.5, 1.0)
"""Seconds from the moment when a program answers signals."""
PROLOGUE = """
import runpy
from wan.utils import signals

answer = signals.end_on_signals

def tell():
    answer()
    print("on", flush=True)

signals.end_on_signals = tell
runpy.run_path({!r}, None, "__main__")
"""
"""Starts a program, and says when it answers. Before, Python itself says that it was interrupted."""


def interrupted(program: Path, number: signal.Signals, seconds: float) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROLOGUE.format(str(program)), "--help"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate()
    if process.returncode != 0:  # the help was there first
        assert process.returncode == 128 + number and errors.startswith("interrupted: "), errors
    assert "Traceback" not in errors and len(errors.splitlines()) <= 1


@pytest.mark.parametrize("program", [ROOT / "scripts" / "select_layers.py", ROOT / "train_stage1.py"], ids=str)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_program_imports(program: Path, number: signal.Signals) -> None:
    for seconds in DELAYS[1:3]:
        interrupted(program, number, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_signal_at_any_moment(program: Path) -> None:
    for seconds in DELAYS * 3:
        interrupted(program, signal.SIGINT, seconds)


def test_a_program_that_was_told_to_ignore_signals_does() -> None:
    command = (
        "import signal; from wan.utils.signals import end_on_signals; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "end_on_signals(); signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 143 and done.stderr == f"interrupted: {GO_ON}\n"


def test_a_program_under_nohup_outlives_its_terminal() -> None:
    command = (
        "import signal; from wan.utils.signals import end_on_signals; end_on_signals(); "
        "from pipelines.cli import entry_point; signal.raise_signal(signal.SIGHUP); "
        "entry_point()(lambda: signal.raise_signal(signal.SIGHUP) or print('done') or 0)()"
    )
    program = ["nohup", sys.executable, "-c", command]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "done\n"
