"""Training on several nodes: two torchrun agents on loopback, one of which dies."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from paths import ROOT
from training_world import build_world, command, free_port, losses, run

STEPS = 60


class Agents:
    """Two agents of one process each, which meet at a free port."""

    def __init__(self, root: Path, *settings: str) -> None:
        port = free_port()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
        line = [*launcher, *meeting, *command(root, 2, *settings)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._files = [root / f"agent-{number}.txt" for number in range(2)]
        self.processes = []
        for path in self._files:
            with path.open("w") as file:
                process = subprocess.Popen(line, env=environment, stdout=file, stderr=file)
            self.processes.append(process)

    def output(self, number: int) -> str:
        """What an agent and its process said."""
        return self._files[number].read_text()

    def kill(self, *numbers: int) -> None:
        """Kill nodes: agents and the processes that they started, which have sessions of their own."""
        for process in (self.processes[number] for number in numbers):
            with suppress(psutil.NoSuchProcess):
                agent = psutil.Process(process.pid)
                for one in (*agent.children(recursive=True), agent):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_node_dies_the_other_says_so_and_the_same_command_goes_on(victim: int, tmp_path: Path) -> None:
    root = build_world(tmp_path)
    settings = (f"steps={STEPS}", "batch=1", "shard=true", "save_every=2")
    run(root, 2, f"run_folder={root / 'one'}", f"steps={STEPS}", "save_every=50")
    folder = root / "nodes"
    agents = Agents(root, f"run_folder={folder}", *settings)
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("step-*")):
            assert all(process.poll() is None for process in agents.processes) and time.monotonic() < deadline
            time.sleep(0.01)
        agents.kill(victim)
        assert agents.processes[1 - victim].wait(timeout=120) != 0
        said = agents.output(1 - victim)
        assert "error: another process of this run is gone" in said, said
        assert not (folder / "export").exists(), "killed too late to show anything"
    finally:
        agents.kill(0, 1)
    agents = Agents(root, f"run_folder={folder}", *settings)
    try:
        # The agent that holds the meeting point ends first, and the other one only after a while.
        while not (folder / "export_ema").exists():
            assert time.monotonic() < deadline + 120, agents.output(0) + agents.output(1)
            time.sleep(0.1)
    finally:
        agents.kill(0, 1)
    for line, same in zip(losses(root / "one"), losses(folder), strict=True):
        assert same == pytest.approx(line, rel=1e-4, abs=1e-8)
