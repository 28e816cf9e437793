"""What a process does while the others of its run do not come."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from wan.utils import ranks
from wan.utils.errors import InputError
from wan.utils.ranks import MEETING_POINT, waiting_for_others

WAIT = """
from wan.utils.signals import end_on_signals
end_on_signals()
from torch.distributed import TCPStore
from wan.utils.ranks import waiting_for_others
print("waits", flush=True)
with waiting_for_others(2):
    TCPStore("127.0.0.1", 0, 2, is_master=True)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MEETING_POINT:
        monkeypatch.setenv(name, "0")


@pytest.mark.parametrize("name", MEETING_POINT)
def test_an_environment_that_names_no_meeting_point_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=f"{name} is not in the environment: start with torchrun"):
        waiting_for_others(2).__enter__()


def test_a_signal_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
    """PyTorch waits outside of Python, where no handler runs: torchrun would kill the process half a minute later."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", WAIT]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM and errors.startswith("interrupted: "), errors


def test_a_process_says_that_it_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING), waiting_for_others(2):
        time.sleep(0.5)
    assert caplog.messages == [
        "still waiting for all 2 processes of this run: if one has ended with an error, or was not started, end this "
        "one (Ctrl-C), mend that and start all again"
    ]
    former = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(former)
    assert former == -1


def test_a_process_that_need_not_wait_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), waiting_for_others(2):
        pass
    with waiting_for_others(1):
        time.sleep(0.3)
    assert not caplog.messages
