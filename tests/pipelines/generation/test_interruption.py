"""inference.py when it is told to stop, or when its disk fills: one line, and nothing half."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import ForkServer, partial_of, wait_until
from inference_world import flags_of, names_in, planned, run_inference, videos_in
from paths import ROOT

from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.run import generate
from pipelines.media.video import VideoWriter
from wan.utils import files
from wan.utils.errors import InputError
from wan.utils.signals import GO_ON

NOTHING_YET = "interrupted: nothing is left half-written; start the same command again to go on"
LINE = "interrupted: finished videos are kept; start the same command again to go on"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_videos_are_made(server: ForkServer, config: Path, number: signal.Signals, status: int) -> None:
    out = config.parent / "out"
    (config.parent / "prompts.txt").write_text("red\nblue\n")
    flags = flags_of(config, "--data_path", config.parent / "prompts.txt", "--num_output_frames", 30)
    run = server.start(*flags)
    wait_until(lambda: videos_in(out) and partial_of(out, run))
    run.send(number)
    assert run.wait() == status and run.errors == [LINE]
    assert names_in(out) == {".mp4", ".json"}
    kept = videos_in(out)
    assert len(kept) == 1
    again = server.start(*flags)
    assert again.wait() == 0 and "1 of 2 videos are finished already" in again.printed
    assert kept.items() <= videos_in(out).items() and len(videos_in(out)) == 2


def test_signals_at_any_moment(server: ForkServer, config: Path) -> None:
    out, draw = config.parent / "out", random.Random(0)
    flags = flags_of(config, "--prompt", "red", "--num_output_frames", 30)
    for _ in range(6):
        run = server.start(*flags)
        time.sleep(draw.uniform(0, 1.5))
        run.send(draw.choice([signal.SIGINT, signal.SIGTERM]))
        status = run.wait()
        # The server's child may not have reached its entry point, or may have ended.
        assert status in (0, 130, 143, -signal.SIGTERM) or not run.printed, run.errors
        if status in (130, 143):
            assert run.errors == [NOTHING_YET] or (run.errors == [LINE] and videos_in(out))
        assert not out.exists() or names_in(out) <= {".mp4", ".json"}
    assert server.start(*flags).wait() == 0
    assert names_in(out) == {".mp4", ".json"}


def test_a_signal_while_modules_are_imported(config: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-v", str(ROOT / "inference.py"), *flags_of(config, "--prompt", "red")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import 'torch"):
            break
    process.send_signal(signal.SIGINT)
    errors = [line.strip() for line in process.stderr]
    assert process.wait() == 130
    # What -v says may lack the end of its line when the signal comes.
    assert any(line.endswith(f"interrupted: {GO_ON}") for line in errors)
    assert not any(line.startswith("Traceback") for line in errors)


def test_a_signal_while_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "pipelines.generation.mixins.loading.load_vae", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert run_inference(monkeypatch, config, "--prompt", "red") == 143
    assert capsys.readouterr().err == NOTHING_YET + "\n" and not list((config.parent / "out").iterdir())


@pytest.mark.parametrize("place", ["_encode", "wait", "write", "finish", "_stop_encoding", "_new_stream"])
def test_a_signal_while_the_encoder_works(
    place: str, monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, calls = getattr(VideoWriter, place), list[int]()

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)
            else:  # the main thread hears of it while this one works
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
        return method(*arguments)

    monkeypatch.setattr(VideoWriter, place, interrupted)
    assert run_inference(monkeypatch, config, "--prompt", "red") == 130
    assert capsys.readouterr().err == NOTHING_YET + "\n" and not list((config.parent / "out").iterdir())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()]
)
def test_lost_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("arl2.rollout.remember_block", fail)
    assert run_inference(monkeypatch, config, "--prompt", "red") == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory") and "window" in line and line.count("\n") == 1
    assert not list((config.parent / "out").iterdir())


@pytest.mark.parametrize("limit", [100, 700, 3000])
def test_a_full_disk(server: ForkServer, config: Path, limit: int) -> None:
    run = server.start(*flags_of(config, "--prompt", "red", "--num_output_frames", 12), file_limit=limit)
    assert run.wait() == 2
    assert len(run.errors) == 1 and run.errors[0].startswith("error: cannot write"), run.errors
    out = config.parent / "out"
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("call", ["replace", "write_text", "mkdir", "touch"])
def test_a_disk_that_turns_read_only(
    call: str, pipeline: CausalVideoPipeline, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(config, "--prompt", "red")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, call, refuse)
    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    with pytest.raises(InputError, match=r"cannot write .*Read-only file system"):
        generate(run, pipeline)
    monkeypatch.undo()
    assert not videos_in(run.output_folder)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match="cannot write"):  # cleaning up raises nothing of its own
        generate(run, pipeline)


def test_a_folder_that_is_removed_meanwhile(
    pipeline: CausalVideoPipeline, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(config, "--prompt", "red")
    stream = CausalVideoPipeline.stream

    def removing(*arguments: object, **options: object) -> object:
        shutil.rmtree(run.output_folder)
        return stream(*arguments, **options)

    monkeypatch.setattr(CausalVideoPipeline, "stream", removing)
    with pytest.raises(InputError, match=r"cannot (read|write)"):
        generate(run, pipeline)
    assert not videos_in(run.output_folder)
