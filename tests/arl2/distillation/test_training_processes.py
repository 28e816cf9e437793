"""Training on two processes: the same numbers as on one, with the backbone replicated and sharded."""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from paths import ROOT
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from training_world import build_world, command, losses, run, run_and_kill, start, weights

from arl2.distillation import checkpointing as training_state
from arl2.distillation.sharding import TENSOR_CLASSES, show_tensors
from arl2.model import HybridWanModel
from pipelines.training import run as training
from wan.checkpoints.formats import TransformerWeights

HALF_A_BATCH = ("batch=1", "steps=4")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world in which both stages were run on one process."""
    root = build_world(tmp_path_factory.mktemp("world"))
    for stage in (1, 2):
        run(root, stage, f"run_folder={root / f'one{stage}'}", "steps=4")
    return root


def assert_same_losses(one: Path, other: Path) -> None:
    for line, same in zip(losses(one), losses(other), strict=True):
        assert same == pytest.approx(line, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [(1, ("shard=true", "blocks_per_graph=3")), (2, ("shard=true", "checkpointing=true"))],
)
def test_two_processes_equal_one_with_the_double_batch(root: Path, stage: int, settings: tuple[str, ...]) -> None:
    folder = root / "-".join(["two", str(stage), *settings])
    run(root, stage, f"run_folder={folder}", *HALF_A_BATCH, *settings, processes=2)
    assert_same_losses(root / f"one{stage}", folder)
    one, two = (path / "export" / "diffusion_pytorch_model.safetensors" for path in (root / f"one{stage}", folder))
    assert one.stat().st_size == two.stat().st_size


def test_a_sharded_student_generates_its_context_as_a_whole_one_does(root: Path) -> None:
    settings = ("context=self_rollout", "steps=2", "checkpointing=true")
    run(root, 2, f"run_folder={root / 'rollout1'}", *settings)
    run(root, 2, f"run_folder={root / 'rollout2'}", *settings, "batch=1", "shard=true", processes=2)
    assert_same_losses(root / "rollout1", root / "rollout2")


def stop_on_nan(layer: str) -> None:
    """Make the weights of a layer, as they are read, hold one NaN in the last row."""
    read = training.read_transformer

    def read_transformer(*arguments: object) -> TransformerWeights:
        weights = read(*arguments)
        weights.state[layer] = weights.state[layer].clone()
        weights.state[layer][-1, -1] = float("nan")
        return weights

    training.read_transformer = read_transformer


def test_a_value_that_is_not_finite_on_one_rank_ends_both(root: Path) -> None:
    name = "blocks.1.ffn.0.weight"
    settings = (f"run_folder={root / 'nan'}", "batch=1", "steps=2", "shard=true")
    processes = start(root, 2, *settings, processes=2, before=partial(stop_on_nan, name))
    for rank, process in enumerate(processes):
        process.join(120)
        said = (root / f"stderr-{rank}.txt").read_text()
        assert process.exitcode == 2, said
        assert ("NaN or infinite" in said and name in said) if rank == 1 else "another process" in said
    assert not list((root / "nan").rglob("*.safetensors"))


def test_a_killed_run_of_two_processes_goes_on_on_one(root: Path) -> None:
    folder = root / "resumed"
    run_and_kill(root, folder, 2, *HALF_A_BATCH, "shard=true", processes=2)
    run(root, 2, f"run_folder={folder}", "steps=4")
    assert_same_losses(root / "one2", folder)


def stop_in_the_second_write() -> None:
    """Make the process stand still for good in the middle of its second checkpoint."""
    save = training_state.save_file

    def save_file(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
        save(tensors, path, header)
        while "step-00000004" in str(path):
            time.sleep(1)

    training_state.save_file = save_file


def test_a_run_killed_while_it_writes_a_checkpoint_ends_as_an_unbroken_one(root: Path) -> None:
    folder = root / "half-written"
    (process,) = start(root, 1, f"run_folder={folder}", "steps=4", before=stop_in_the_second_write)
    deadline = time.monotonic() + 60
    while not (half := next((folder / "checkpoints").glob(".step-00000004.*.part/trainables.safetensors"), None)):
        assert process.is_alive() and time.monotonic() < deadline, (root / "stderr-0.txt").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not half.with_name("state.json").exists() and not (folder / "checkpoints" / "step-00000004").exists()
    run(root, 1, f"run_folder={folder}", "steps=4")
    assert losses(folder) == losses(root / "one1") and weights(folder, 4) == weights(root / "one1", 4)
    assert not half.exists()


def note_bytes() -> None:
    """Write down, at the end of a run, how many bytes of the blocks' frozen weights there are here, and in all.

    What lies outside of the blocks stays whole after the last forward.
    """

    def export(model: HybridWanModel, ema: object, folder: Path, accelerator: Accelerator) -> None:
        frozen = [parameter for parameter in model.blocks.parameters() if not parameter.requires_grad]
        here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)
        page = json.dumps([here, sum(p.numel() * p.element_size() for p in frozen)])
        (folder / f"bytes-{accelerator.process_index}.json").write_text(page)

    training.export = export


def test_a_process_holds_its_share_of_the_trunk(root: Path) -> None:
    folder = root / "shares"
    run(root, 2, f"run_folder={folder}", "batch=1", "steps=1", "shard=true", processes=2, before=note_bytes)
    pages = [json.loads((folder / f"bytes-{rank}.json").read_text()) for rank in (0, 1)]
    assert pages[0][1] == pages[1][1] and sum(here for here, _ in pages) == pages[0][1]
    assert all(0.4 < here / whole < 0.6 for here, whole in pages)


def test_a_process_that_ends_badly_lets_the_others_finish(tmp_path: Path) -> None:
    script = """
import pathlib, sys, time
from pipelines.cli import agreed_status, rank_and_world_size
rank = rank_and_world_size()[0]
time.sleep(3 * (1 - rank))
pathlib.Path(sys.argv[1], str(rank)).touch()
raise SystemExit(agreed_status(rank))
"""
    (tmp_path / "work.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [*launcher, str(tmp_path / "work.py"), str(tmp_path)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and (tmp_path / "0").exists() and (tmp_path / "1").exists(), done.stderr


def test_torchrun_starts_it(root: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = launcher + command(root, 1, f"run_folder={root / 'torchrun'}", *HALF_A_BATCH)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_losses(root / "one1", root / "torchrun")


@pytest.mark.parametrize("kind", TENSOR_CLASSES)
def test_sharding_finds_every_tensor_that_blocks_exchange(kind: type) -> None:
    show_tensors()
    tensors = [torch.zeros(1, number + 1) for number in range(len(fields(kind)))]
    found = tree_leaves({"block": [kind(*tensors)]})
    assert all(one is other for one, other in zip(found, tensors, strict=True))
