"""A model, data and configs that a training test finishes with in a second."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny_models import HEIGHT, TINY, WIDTH, tiny_model

from arl2.distillation.latent_writer import LatentWriter

CONFIG = """
model_folder: {root}/model
data: [{root}/data]
run_folder: {root}/run
steps: 6
batch: 2
save_every: 2
report_every: 3
tracker: none
device: cpu
ema_decay: 0.5
optimizer: {{lr: 0.01, warmup_steps: 2}}
"""
STAGE2 = "hybrid_layers: [0, 2]\nlora_rank: 3\nlora_alpha: 6.0\nlevels: {per_block: 2}\n"


def build_world(root: Path) -> Path:
    """Write a tiny softmax model, five videos of three blocks, and the configs stage1.yaml and stage2.yaml."""
    torch.manual_seed(3)
    tiny_model(dtype=torch.float32).save_pretrained(root / "model")
    with LatentWriter(root / "data", {"made": "for tests"}) as writer:
        for seed in range(5):
            latents = torch.randn(9, TINY["in_dim"], HEIGHT, WIDTH)
            writer.add(str(seed), latents, f"prompt {seed}", seed, torch.randn(4, TINY["text_dim"]))
    (root / "stage1.yaml").write_text(CONFIG.format(root=root))
    (root / "stage2.yaml").write_text(CONFIG.format(root=root) + STAGE2)
    return root


def write_toy_videos(folder: Path) -> None:
    """Write eight random videos of four blocks in the toy world's sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = json.loads((ROOT / "models/toyworld/transformer/config.json").read_text())
    with LatentWriter(folder, {"made": "for tests"}) as writer:
        for seed in range(8):
            latents = torch.randn(12, sizes["in_dim"], 8, 12, generator=generator)
            embedding = torch.randn(sizes["text_len"], sizes["text_dim"], generator=generator)
            writer.add(str(seed), latents, f"prompt {seed}", seed, embedding)


def command(root: Path, stage: int, *settings: str) -> list[str]:
    """The command line of a stage, after the interpreter."""
    return [str(ROOT / f"train_stage{stage}.py"), "--config", str(root / f"stage{stage}.yaml"), *settings]


def start(
    root: Path, stage: int, *settings: str, processes: int = 1, before: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """Start a stage in processes of its own, as torchrun would, but without importing torch in each.

    Args:
        before: called in each process first, to change what it will do.
    """
    return start_entry_point(command(root, stage, *settings), root, processes, before)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_entry_point(
    line: list[str], folder: Path, processes: int = 1, before: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """Start an entry point of the project in processes of its own; see `start`.

    Args:
        line: the command line, after the interpreter.
        folder: where each process leaves what it says, in stderr-<rank>.txt.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.training.run"])
    port = free_port()
    started: list[BaseProcess] = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        arguments = (line, variables if processes > 1 else {}, folder / f"stderr-{rank}.txt", before)
        started.append(context.Process(target=_main, args=arguments))
        started[-1].start()
    return started


def _main(
    arguments: list[str], variables: dict[str, int], stderr: Path, before: Callable[[], None] | None = None
) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.path.insert(0, str(ROOT))
    if before is not None:
        before()
    sys.exit(import_module(Path(arguments[0]).stem).main())


def run(root: Path, stage: int, *settings: str, processes: int = 1, before: Callable[[], None] | None = None) -> None:
    """Run a stage to its end in processes of its own; arguments as in `start`."""
    for rank, process in enumerate(start(root, stage, *settings, processes=processes, before=before)):
        process.join(240)  # a busy machine takes its time
        assert process.exitcode == 0, (root / f"stderr-{rank}.txt").read_text()


def run_and_kill(root: Path, run_folder: Path, stage: int, *settings: str, processes: int = 1) -> None:
    """Start a run, and kill all its processes at once when there is a second checkpoint."""
    started = start(root, stage, f"run_folder={run_folder}", *settings, processes=processes)
    deadline = time.monotonic() + 60
    while not (run_folder / "checkpoints" / "step-00000002").is_dir():
        assert started[0].is_alive() and time.monotonic() < deadline, (root / "stderr-0.txt").read_text()
        time.sleep(0.002)
    for process in started:
        process.kill()
    for process in started:
        process.join()
    assert not (run_folder / "export").exists(), "killed too late to show anything"


def losses(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without their seconds."""
    lines = [json.loads(line) for line in (run_folder / "losses.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(
    run_folder: Path, steps: int, names: Sequence[str] = ("trainables", "ema", "optimizer")
) -> dict[str, bytes]:
    """The files of a checkpoint."""
    folder = run_folder / "checkpoints" / f"step-{steps:08d}"
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in names}


def train(monkeypatch: pytest.MonkeyPatch, root: Path, stage: int, *settings: str) -> int:
    """Run a stage in this process; returns its exit status."""
    torch.set_num_threads(1)  # as started processes have it: the same bits, and no thread waits for another
    monkeypatch.setattr(sys, "argv", command(root, stage, *settings))
    status: int = import_module(f"train_stage{stage}").main()
    return status


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, which a run that failed leaves."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
