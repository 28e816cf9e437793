"""How a run ends before its last step: signals, a second training, a full disk, an error of one process of several."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training_world import build_world, losses, one_line, start, train, weights

from arl2.distillation import trainer
from arl2.distillation.checkpointing import complete_checkpoints
from arl2.distillation.stage1 import Stage1
from arl2.distillation.trainer import Trainer
from pipelines.training import run as training
from wan.utils.errors import InputError
from wan.utils.json_lines import JsonLinesWriter, read_json_lines
from wan.utils.locks import exclusive

PARTS = ("trainables", "optimizer")
CONSTANT = "optimizer.decay=constant"
RARELY = ("save_every=1000", "report_every=1000", "steps=14")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def slowly(seconds: float = 0.1) -> None:
    """Let every step take a while, so that a signal meets it."""
    honest = Trainer._record

    def record(self: Trainer, *arguments: Any) -> None:
        honest(self, *arguments)
        time.sleep(seconds)

    Trainer._record = record  # type: ignore[method-assign]


def stuck_in_the_third_step() -> None:
    """Let the third step never end."""
    honest, calls = Stage1.losses, iter(range(100))

    def losses_of(self: Stage1, *arguments: Any) -> Iterator[Any]:
        if next(calls) == 2:
            Path(os.environ["STUCK"]).touch()
            while True:
                time.sleep(0.01)
        yield from honest(self, *arguments)

    Stage1.losses = losses_of  # type: ignore[method-assign]


def wait_for(condition: Callable[[], bool], process: BaseProcess, root: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, (root / "stderr-0.txt").read_text()
        time.sleep(0.005)


def has_lines(run: Path, number: int) -> bool:
    log = run / "losses.jsonl"
    return log.is_file() and log.read_bytes().count(b"\n") >= number


def messages(root: Path, processes: int = 1) -> list[str]:
    """The one line that each process left on standard error."""
    lines = [(root / f"stderr-{rank}.txt").read_text() for rank in range(processes)]
    assert all(line.count("\n") == 1 for line in lines), lines
    return lines


@pytest.mark.parametrize(("stage", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (1, signal.SIGHUP)])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, number: signal.Signals
) -> None:
    root, run = build_world(tmp_path), tmp_path / "stopped"
    (process,) = start(root, stage, f"run_folder={run}", *RARELY, before=slowly)
    wait_for(lambda: has_lines(run, 3), process, root)
    os.kill(process.pid or 0, number)
    if number == signal.SIGHUP:  # twice: by the terminal and by its shell
        time.sleep(0.005)
        os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 128 + number
    done = len(losses(run))
    (line,) = messages(root)
    assert f"{done} of 14 steps are done" in line and "start the same command again to go on" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"] and 3 <= done < 14
    assert not (run / "export").exists() and not (run / ".lock").exists()
    for folder in (run, root / "run"):
        assert train(monkeypatch, root, stage, *RARELY, f"run_folder={folder}") == 0
    assert losses(run) == losses(root / "run") and weights(run, 14) == weights(root / "run", 14)


def test_a_second_signal_ends_a_run_at_once_and_the_last_checkpoint_stays(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", str(tmp_path / "stuck"))
    before = partial(_with_environment, {"STUCK": str(tmp_path / "stuck")}, stuck_in_the_third_step)
    run = tmp_path / "run"
    (process,) = start(world, 1, f"run_folder={run}", CONSTANT, before=before)
    wait_for((tmp_path / "stuck").exists, process, world)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(0.5)
    assert process.is_alive(), "the step in flight is waited for"
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM and "Traceback" not in (world / "stderr-0.txt").read_text()
    assert train(monkeypatch, world, 1, f"run_folder={run}", CONSTANT) == 0
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4, 5, 6]


def _with_environment(variables: dict[str, str], then: Callable[[], None]) -> None:
    os.environ |= variables
    then()


def stuck_while_loading() -> None:
    def build(*arguments: object) -> None:
        Path(os.environ["STUCK"]).touch()
        while True:
            time.sleep(0.01)

    training.build_model = build  # type: ignore[assignment]


def test_a_signal_while_models_load_ends_at_once(world: Path, tmp_path: Path) -> None:
    before = partial(_with_environment, {"STUCK": str(tmp_path / "stuck")}, stuck_while_loading)
    (process,) = start(world, 1, f"run_folder={tmp_path / 'run'}", before=before)
    wait_for((tmp_path / "stuck").exists, process, world)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 143
    assert messages(world)[0].startswith("interrupted: ")


def test_a_signal_to_one_process_ends_all_in_the_same_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    processes = start(world, 2, f"run_folder={run}", *RARELY, "batch=1", processes=2, before=slowly)
    wait_for(lambda: has_lines(run, 2), processes[0], world)
    os.kill(processes[1].pid or 0, signal.SIGINT)
    for process in processes:
        process.join(60)
    assert [process.exitcode in (130, 143) for process in processes] == [True, True] and processes[1].exitcode == 130
    done = len(losses(run))
    assert all(f"{done} of 14 steps are done" in line for line in messages(world, 2))
    for folder in (run, tmp_path / "whole"):
        assert train(monkeypatch, world, 2, *RARELY, f"run_folder={folder}") == 0
    for one, other in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)


def test_a_second_training_in_a_folder_is_refused_and_told_by_whom(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    before = partial(_with_environment, {"STUCK": str(tmp_path / "stuck")}, stuck_in_the_third_step)
    (process,) = start(world, 1, f"run_folder={run}", CONSTANT, before=before)
    wait_for((tmp_path / "stuck").exists, process, world)
    there = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(monkeypatch, world, 1, f"run_folder={run}", CONSTANT) == 2
    assert f"the run {run} is in use by process {process.pid} on " in one_line(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == there
    process.kill()
    process.join()
    assert train(monkeypatch, world, 1, f"run_folder={run}", CONSTANT) == 0, "the dead hold no lock"
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4, 5, 6]


def statuses(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def test_a_second_training_of_two_processes_ends_as_a_whole(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with exclusive(run / ".lock", "the run"):
        assert statuses(start(world, 1, f"run_folder={run}", "batch=1", processes=2)) == [2, 2]
    first, second = messages(world, 2)
    assert f"process {os.getpid()} on" in first and "another process of this run cannot go on" in second
    assert not list(run.glob("*"))


def fail_to_save() -> None:
    honest = trainer.save_state

    def save_state(state: Any, *arguments: Any) -> None:
        if state.progress.step == 4:
            raise InputError("cannot write it: free space")
        honest(state, *arguments)

    trainer.save_state = save_state


def fail_to_export() -> None:
    def export(*arguments: object) -> None:
        raise InputError("cannot write it: free space")

    from pipelines.training import export as room

    room.write_model_folder = export  # type: ignore[assignment]


@pytest.mark.parametrize("before", [fail_to_save, fail_to_export])
def test_an_error_of_one_process_ends_all(world: Path, tmp_path: Path, before: Callable[[], None]) -> None:
    run = tmp_path / "run"
    assert statuses(start(world, 1, f"run_folder={run}", "batch=1", processes=2, before=before)) == [2, 2]
    first, second = messages(world, 2)
    assert first == "error: cannot write it: free space\n" and "another process" in second
    assert not (run / "export").exists()


@pytest.mark.parametrize("settings", [("shard=false",), ("shard=true",)])
def test_a_sample_that_one_process_cannot_read_ends_all(world: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    data, run = Path(shutil.copytree(world / "data", tmp_path / "data")), tmp_path / "run"
    shard = data / "shard-00000.safetensors"
    state = load_file(shard)
    state["latents.2"].fill_(float("nan"))
    save_file(state, shard)
    more = (f"data=[{data}]", f"run_folder={run}", "batch=1", *settings)
    assert statuses(start(world, 2, *more, processes=2)) == [2, 2]
    assert all("sample '2'" in line for line in messages(world, 2))  # its hash told before the first step
    index = json.loads((data / "index.json").read_text())
    for sample in index["samples"]:
        del sample["latents_hash"], sample["text_hash"]  # as earlier versions wrote it
    (data / "index.json").write_text(json.dumps(index))
    assert statuses(start(world, 2, *more, processes=2)) == [2, 2]
    assert sorted("sample '2'" in line for line in messages(world, 2)) == [False, True]


def give_rank_one(*settings: str) -> None:
    if os.environ["RANK"] == "1":
        sys.argv += settings


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr=0.02", "optimizer.lr is 0.01 on rank 0 and 0.02 on rank 1"),
        ("steps=5", "steps is 6 on rank 0 and 5 on rank 1"),
        ("shard=true", "shard is False on rank 0 and True on rank 1"),
        ("data=[{}/nothing]", "another process of this run cannot go on"),
    ],
)
def test_processes_that_were_not_started_alike_are_refused(
    world: Path, tmp_path: Path, setting: str, named: str
) -> None:
    """With another learning rate the replicas of what trains would drift apart, and the first one's be kept."""
    before = partial(give_rank_one, setting.format(tmp_path))
    run = tmp_path / "run"
    assert statuses(start(world, 1, f"run_folder={run}", "batch=1", processes=2, before=before)) == [2, 2]
    first, second = messages(world, 2)
    assert named in first.splitlines()[-1], first
    assert named in second.splitlines()[-1] or "no training data in" in second.splitlines()[-1], second
    assert not (run / "checkpoints").exists()


def test_a_process_that_does_not_see_the_run_is_refused(world: Path, tmp_path: Path) -> None:
    """Of a node whose folder is its own: it would begin anew, and average its gradients with the others' later ones."""
    run = tmp_path / "run"
    two = partial(start, world, 1, f"run_folder={run}", "batch=1", CONSTANT, processes=2)
    assert statuses(two("steps=2")) == [0, 0]
    before = partial(give_rank_one, f"run_folder={tmp_path / 'other'}")
    assert statuses(two("steps=4", before=before)) == [2, 2]
    for message in messages(world, 2):
        assert "the step of the newest checkpoint is 2 on rank 0 and None on rank 1" in message
    assert [line["step"] for line in losses(run)] == [1, 2]


def test_a_process_with_other_weights_is_refused(world: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(world / "model", tmp_path / "model"))
    file = next(other.glob("*.safetensors"))
    state = load_file(file)
    state["patch_embedding.weight"] += 1
    save_file(state, file)
    run, before = tmp_path / "run", partial(give_rank_one, f"model_folder={other}")
    assert statuses(start(world, 1, f"run_folder={run}", "batch=1", processes=2, before=before)) == [2, 2]
    assert all("teacher is" in message for message in messages(world, 2))


LIMITS = {1000: (0, 5000, 9000, 14000, 24000, 40000), 2: (5000, 14000)}
"""Bytes that a file may have, as on a full disk, by the steps between reports."""


def test_a_full_disk_at_any_moment_is_one_line_and_the_last_checkpoint_stays(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, whole, run = tmp_path / "before", tmp_path / "whole", tmp_path / "run"
    more = (CONSTANT, "report_every=2", "keep=9", "ema_decay=null")
    assert train(monkeypatch, world, 1, f"run_folder={before}", *more, "steps=2") == 0
    shutil.rmtree(before / "export")
    assert train(monkeypatch, world, 1, f"run_folder={whole}", *more) == 0
    failed = set()
    cases = [(every, limit) for every, limits in LIMITS.items() for limit in limits]
    for every, limit in cases:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)
        capsys.readouterr()
        was = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, was[1]))
        try:
            status = train(monkeypatch, world, 1, f"run_folder={run}", *more, f"report_every={every}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, was)
        message = one_line(capsys)
        assert status == 2 and "cannot write" in message, message
        failed.add(message.split("run/")[-1].split(" ")[0].split("/")[0])
        for checkpoint in complete_checkpoints(run / "checkpoints"):
            step = int(checkpoint.name[5:])
            assert weights(run, step, PARTS) == weights(whole, step, PARTS)
        assert not [path for path in run.rglob(".*") if path.suffix == ".part"]
    assert failed >= {"checkpoints", "losses.png", "export"}, failed
    assert train(monkeypatch, world, 1, f"run_folder={run}", *more) == 0
    assert losses(run) == losses(whole) and weights(run, 6, PARTS) == weights(whole, 6, PARTS)


def test_a_log_on_a_full_disk_keeps_its_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonLinesWriter(log) as lines:
        lines.write({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (18, was[1]))
        try:
            for _ in range(2):
                with pytest.raises(InputError, match="cannot write"):
                    lines.write({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert log.stat().st_size == 18 and read_json_lines(log) == [{"step": 1}]


def test_a_tracker_on_a_full_disk_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.log", log)
    assert train(monkeypatch, world, 1, f"run_folder={tmp_path / 'run'}") == 2
    assert "No space left" in one_line(capsys)
