"""Sharded training on two GPUs: the losses of one process, for everything that can be trained.

    python -m pytest -m gpu -n 6 tests/arl2/distillation/test_sharding_gpu.py --junitxml sharding.xml

The reference computes the same two half batches one after the other, so kernels see the same shapes. Model and sizes
are those of the toy world, whose channels the GPU's kernels take. Losses are between 0.04 and 0.3; the bounds are
absolute. Algorithms are deterministic, since the backward pass of bfloat16 attention is not by default: two runs of one
process differ by 5e-3 of the loss, and by more where the student's own frames are remembered
(docs/results/many_gpus.md).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from training_world import losses, write_toy_videos

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STEPS = 40
TOLERANCES = {"bfloat16": 1e-3, "float32": 1e-5}
CONFIGS = {
    "stage1": ("train_stage1.py", "configs/toyworld/stage1.yaml", ()),
    "stage2": ("train_stage2.py", "configs/toyworld/stage2.yaml", ("init_from=null",)),
    "gates": (None, "configs/gates.yaml", ("checkpoint_path=null",)),
}


LONG = ("teacher_weight=0", "data_weight=1", "memory.kind=window", "memory.window_frames=6", "memory.sink_frames=3")
"""Training on long videos, in segments."""
GATES = """
from pipelines.training.config import GatesConfig
from pipelines.training.run import parse_config, train

train(parse_config(GatesConfig, None))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_toy_videos`."""
    folder = tmp_path_factory.mktemp("data")
    write_toy_videos(folder)
    return folder


def command(what: str, data: Path, run: Path, *settings: str, processes: int) -> list[str]:
    script, config, own = CONFIGS[what]
    if script is None:
        path = data / "gates.py"
        path.write_text(GATES)
        script = str(path)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    batch = ("shard=true", "batch=2", "accumulation=1") if processes > 1 else ("batch=2", "accumulation=2")
    paths = ("model_folder=models/toyworld", f"data=[{data}]", f"run_folder={run}")
    common = (
        "deterministic=true",
        f"steps={STEPS}",
        "save_every=10",
        "report_every=20",
        "sample_every=0",
        "tracker=none",
        "ema_decay=null",
    )
    return [*launcher, script, "--config", config, *paths, *common, *batch, *own, *settings]


def start(*arguments: Any, processes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments, processes=processes),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: Any, processes: int) -> list[dict[str, Any]]:
    """The log of a training that was run to its end."""
    process = start(*arguments, processes=processes)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    return losses(arguments[2])


def differences(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Differences of losses by step."""
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    return [abs(line["loss"] - other["loss"]) for line, other in zip(lines, others, strict=True)]


@pytest.fixture(scope="module")
def stage1(data: Path) -> Path:
    """A run of stage 1 of a few steps, which layer gates start from."""
    folder = data.with_name("stage1")
    run("stage1", data, folder, "forward_mode=parallel", "steps=4", processes=1)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("stage1", ("forward_mode=parallel",)),
        ("stage1", ("forward_mode=sequential",)),
        ("stage1", ("forward_mode=sequential", "blocks_per_graph=2")),
        ("stage2", ("forward_mode=parallel", "checkpointing=false")),
        ("stage2", ("forward_mode=parallel", "checkpointing=true")),
        ("stage2", ("forward_mode=parallel", "checkpointing=true", "offload_checkpoints=true")),
        ("stage2", ("forward_mode=sequential", "checkpointing=false")),
        ("stage2", ("forward_mode=sequential", "checkpointing=true", "blocks_per_graph=2")),
        ("stage2", ("forward_mode=sequential", "checkpointing=true", "context=self_rollout")),
        ("stage2", ("forward_mode=parallel", "checkpointing=true", "blocks_per_graph=2", *LONG)),
        ("gates", ("forward_mode=parallel",)),
        ("gates", ("forward_mode=sequential",)),
    ],
)
def test_two_sharded_processes_equal_one(
    what: str,
    settings: tuple[str, ...],
    dtype: str,
    data: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    both = [*settings, f"dtype={dtype}"]
    if what == "gates":
        both.append(f"init_from={request.getfixturevalue('stage1')}")
    reference = run(what, data, tmp_path / "one", *both, processes=1)
    found = differences(run(what, data, tmp_path / "two", *both, processes=2), reference)
    record_property("differences", found)
    assert max(found) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_on_another_number_of_gpus(
    before: int, after: int, data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    settings = ("forward_mode=parallel", "dtype=float32")
    reference = run("stage2", data, tmp_path / "whole", *settings, processes=1)
    process = start("stage2", data, tmp_path / "broken", *settings, processes=before)
    deadline = time.monotonic() + 400
    while not (tmp_path / "broken" / "checkpoints" / "step-00000010").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    lines = run("stage2", data, tmp_path / "broken", *settings, processes=after)
    found = differences(lines, reference)
    record_property("differences", found)
    assert max(found) <= TOLERANCES["float32"]
