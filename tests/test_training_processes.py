"""Training on two processes: the same numbers as on one, with the trunk replicated and sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_world import ROOT, build_world, command, losses, run, run_and_kill

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


def test_a_killed_run_of_two_processes_goes_on_on_one(root: Path) -> None:
    folder = root / "resumed"
    run_and_kill(root, folder, 2, *HALF_A_BATCH, "shard=true", processes=2)
    run(root, 2, f"run_folder={folder}", "steps=4")
    assert_same_losses(root / "one2", folder)


def test_torchrun_starts_it(root: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = launcher + command(root, 1, f"run_folder={root / 'torchrun'}", *HALF_A_BATCH)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_losses(root / "one1", root / "torchrun")
