"""Training on several nodes: two torchrun agents on loopback, one of which dies."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from paths import ROOT
from training_world import build_world, command, free_port, losses, run, write_toy_videos

STEPS = 16


class Agents:
    """Two agents of one process each, which meet at a free port.

    Args:
        root: where they leave what they say.
        line: the command line that they start, after the interpreter.
        environments: variables of each node.
    """

    def __init__(self, root: Path, line: list[str], environments: tuple[dict[str, str], ...] = ({}, {})) -> None:
        port = free_port()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self._files = [root / f"agent-{number}.txt" for number in range(2)]
        self.processes = []
        for path, own in zip(self._files, environments, strict=True):
            with path.open("w") as file:
                all_of_it = [*launcher, *meeting, *line]
                process = subprocess.Popen(all_of_it, env=environment | own, stdout=file, stderr=file)
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


def until_a_node_dies(agents: Agents, victim: int, folder: Path) -> float:
    """Kill a node after the first checkpoint; returns how many seconds later the process of the other one says so.

    Its agent ends a minute later, which nothing here waits for.
    """
    try:
        deadline = time.monotonic() + 200
        while not list((folder / "checkpoints").glob("step-*")):
            assert all(process.poll() is None for process in agents.processes), agents.output(0) + agents.output(1)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        agents.kill(victim)
        killed = time.monotonic()
        while "error: another process of this run is gone" not in agents.output(1 - victim):
            assert time.monotonic() < killed + 60, agents.output(1 - victim)
            time.sleep(0.1)
        seconds = time.monotonic() - killed
        assert not (folder / "export").exists(), "killed too late to show anything"
    finally:
        agents.kill(0, 1)
    return seconds


def until_all_is_trained(agents: Agents, folder: Path) -> None:
    """Wait for the export."""
    try:
        deadline = time.monotonic() + 240
        # The agent that holds the meeting point ends first, and the other one only after a while.
        while not (folder / "export_ema").exists():
            assert time.monotonic() < deadline, agents.output(0) + agents.output(1)
            time.sleep(0.1)
    finally:
        agents.kill(0, 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_node_dies_the_other_says_so_and_the_same_command_goes_on(victim: int, tmp_path: Path) -> None:
    root = build_world(tmp_path)
    run(root, 2, f"run_folder={root / 'one'}", f"steps={STEPS}", "save_every=50")
    folder = root / "nodes"
    settings = (f"run_folder={folder}", f"steps={STEPS}", "batch=1", "shard=true", "save_every=2")
    agents = Agents(root, command(root, 2, *settings))
    until_a_node_dies(agents, victim, folder)
    agents = Agents(root, command(root, 2, *settings))
    until_all_is_trained(agents, folder)
    for line, same in zip(losses(root / "one"), losses(folder), strict=True):
        assert same == pytest.approx(line, rel=1e-4, abs=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_node_with_a_gpu_dies_the_other_says_so_and_the_same_command_goes_on(
    victim: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """NCCL over sockets, as between machines: the one that is left waits in a kernel."""
    write_toy_videos(tmp_path / "data")
    folder = tmp_path / "nodes"
    paths = ("model_folder=models/toyworld", f"data=[{tmp_path / 'data'}]", f"run_folder={folder}", "init_from=null")
    settings = (f"steps={STEPS}", "batch=1", "shard=true", "save_every=5", "tracker=none", "sample_every=0")
    config = str(ROOT / "configs/toyworld/stage2.yaml")
    line = [str(ROOT / "train_stage2.py"), "--config", config, *paths, *settings, "ema_decay=0.9"]
    nodes = tuple({"CUDA_VISIBLE_DEVICES": str(number), "NCCL_HOSTID": f"node-{number}"} for number in range(2))
    seconds = until_a_node_dies(Agents(tmp_path, line, nodes), victim, folder)
    record_property("seconds_to_the_end_of_the_other_node", seconds)
    until_all_is_trained(Agents(tmp_path, line, nodes), folder)
    assert [one["step"] for one in losses(folder)] == list(range(1, STEPS + 1))
