"""Two processes on one output folder: both end right, whoever is killed when."""

import json
import shutil
import signal
from importlib import import_module
from pathlib import Path

import pytest
from forked import ForkServer, partial_of, wait_until
from inference_world import flags_of, names_in, planned, run_inference, videos_in, write_config

from pipelines.generation.announcements import announced
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.records import lock_path
from pipelines.generation.run import generate
from pipelines.media.video import count_frames
from wan.utils.errors import InputError
from wan.utils.files import content_hash
from wan.utils.locks import exclusive


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("red\nblue\nshape\n")
    return path


def assert_whole(folder: Path, videos: int, latent_frames: int) -> None:
    """Videos that their records describe, and nothing else."""
    assert names_in(folder) == {".mp4", ".json"}
    paths = sorted(folder.glob("*.mp4"))
    assert len(paths) == videos
    for path in paths:
        facts = json.loads(path.with_suffix(".json").read_text())["video"]
        assert count_frames(path) == facts["frames"] == 4 * latent_frames - 3
        assert content_hash(path) == facts["sha256"]


def test_the_same_command_twice_makes_every_video_once(server: ForkServer, config: Path, prompts: Path) -> None:
    out = config.parent / "out"
    flags = flags_of(config, "--data_path", prompts, "--num_output_frames", 12)
    runs = [server.start(*flags) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.errors for run in runs]
    assert_whole(out, 3, 12)
    alone = config.parent / "alone"
    assert server.start(*flags, "--output_folder", alone).wait() == 0
    assert videos_in(alone) == videos_in(out)
    printed = runs[0].printed + runs[1].printed
    assert printed.count("other videos first") + printed.count("finished") >= 1, "they met"


def test_the_second_is_killed_after_its_first_block(server: ForkServer, config: Path, prompts: Path) -> None:
    out = config.parent / "out"
    flags = flags_of(config, "--data_path", prompts, "--num_output_frames", 30, "--memory", "window")
    first = server.start(*flags)
    wait_until(lambda: partial_of(out, first))
    second = server.start(*flags)
    wait_until(lambda: partial_of(out, second))
    second.send(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL and first.wait() == 0, first.errors
    assert_whole(out, 3, 30)


def test_the_first_is_killed_while_the_second_waits_for_its_video(server: ForkServer, config: Path) -> None:
    out = config.parent / "out"
    flags = flags_of(config, "--prompt", "red", "--num_output_frames", 60, "--memory", "window")
    first = server.start(*flags)
    wait_until(lambda: partial_of(out, first))
    second = server.start(*flags)
    wait_until(lambda: "waiting for" in second.printed)
    assert f"made by process {first.pid} on" in second.printed
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and second.wait() == 0, second.errors
    assert_whole(out, 1, 60)


def test_other_settings_for_a_video_that_another_process_makes_are_refused(server: ForkServer, config: Path) -> None:
    out = config.parent / "out"
    flags = flags_of(config, "--prompt", "red", "--num_output_frames", 30)
    first = server.start(*flags, "--memory", "window")
    wait_until(lambda: partial_of(out, first))
    second = server.start(*flags, "--memory", "full")
    assert (first.wait(), second.wait()) == (0, 2)
    assert len(second.errors) == 1 and "memory.kind was window, is full" in second.errors[0]
    assert_whole(out, 1, 30)


def test_what_another_process_makes_is_left_for_later(
    pipeline: CausalVideoPipeline, config: Path, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = planned(config, "--data_path", prompts)
    assert generate(run, pipeline) == 0
    made = videos_in(run.output_folder)
    aside = config.parent / "aside"
    shutil.move(run.output_folder, aside)
    lock = exclusive(lock_path(run, run.jobs[0]), "it")
    lock.__enter__()

    def finish_first() -> None:
        assert len(videos_in(run.output_folder)) == 2, "its other videos come first"
        for path in aside.glob(f"{run.jobs[0].name}.*"):
            shutil.copy(path, run.output_folder)
        lock.__exit__(None, None, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan.utils.locks.time.sleep", lambda seconds: finish_first())
        caplog.set_level("INFO")
        assert generate(run, pipeline) == 0
    assert "other videos first" in caplog.text and "finished by another process" in caplog.text
    assert videos_in(run.output_folder) == made and names_in(run.output_folder) == {".mp4", ".json"}


def test_a_lock_left_on_a_finished_video_goes(pipeline: CausalVideoPipeline, config: Path) -> None:
    run = planned(config, "--prompt", "red")
    generate(run, pipeline)
    lock_path(run, run.jobs[0]).write_text("{}")
    assert generate(run, pipeline) == 0
    assert names_in(run.output_folder) == {".mp4", ".json"}


def test_two_writers_of_records_in_one_metrics_folder(
    monkeypatch: pytest.MonkeyPatch, config: Path, folder: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics"
    flags = ("--prompt", "red", "--metrics_dir", metrics)
    assert run_inference(monkeypatch, write_config(tmp_path, folder), *flags) == 0
    assert run_inference(monkeypatch, config, *flags) == 0
    assert names_in(metrics) == {".json"} and names_in(tmp_path / "out") == {".mp4"}


def test_a_second_demo_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = import_module("demo")
    monkeypatch.setattr(demo, "OUTPUT_FOLDER", tmp_path / "demo")
    monkeypatch.setattr("sys.argv", ["demo.py"])
    with exclusive(tmp_path / "demo" / ".demo.lock", "the demo"):
        assert demo.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is in use by process" in error


def test_a_run_of_other_settings_is_refused_before_it_makes_a_video(
    server: ForkServer, config: Path, prompts: Path
) -> None:
    """The first comes late to the prompts that they share."""
    out = config.parent / "out"
    flags = flags_of(config, "--num_output_frames", 21)
    first = server.start(*flags, "--data_path", prompts, "fps=8")
    wait_until(lambda: partial_of(out, first))
    (config.parent / "last.txt").write_text("shape\nblue\n")
    second = server.start(*flags, "--data_path", config.parent / "last.txt", "fps=16")
    assert (second.wait(), first.wait()) == (2, 0), first.errors
    assert len(second.errors) == 1 and "(fps was 8, is 16): wait until it has ended" in second.errors[0]
    assert f"is to be made by process {first.pid} on" in second.errors[0]
    assert_whole(out, 3, 21)


def test_a_rank_of_other_settings_is_refused(pipeline: CausalVideoPipeline, config: Path, prompts: Path) -> None:
    """Ranks divide the prompts: none of its videos is one of the other's."""
    run = planned(config, "--data_path", prompts)
    other = planned(config, "--data_path", prompts, "fps=9")
    generate(run, pipeline, 0, 2)
    settings = json.loads(next(run.output_folder.glob("*.json")).read_text())["settings"]
    first = announced(run.output_folder, settings, {job.name: {} for job in run.jobs[::2]})
    with first, pytest.raises(InputError, match="fps was 16, is 9"):
        generate(other, pipeline, 1, 2)
    assert len(videos_in(run.output_folder)) == 2


def test_what_is_announced_ends_with_the_run(tmp_path: Path) -> None:
    settings = {"fps": 8}
    with announced(tmp_path, settings, {"a": {}, "b": {"image": "x"}}):
        with announced(tmp_path, settings, {"a": {}, "b": {"image": "x"}}), announced(tmp_path, {"fps": 16}, {"c": {}}):
            assert len(list(tmp_path.glob(".run-*.json"))) == 3
        for other, videos, message in (
            ({"fps": 16}, {"a": {}}, r"a\.mp4 is to be made by process .* with other settings \(fps was 8, is 16\)"),
            (settings, {"b": {"image": "y"}}, "image was x, is y"),
        ):
            with pytest.raises(InputError, match=message), announced(tmp_path, other, videos):
                pytest.fail("it began")
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())
    for name in (".run-dead.lock", ".run-dead.json"):  # of a run that was killed
        (tmp_path / name).write_text('{"settings": {"fps": 1}, "videos": {"a": {}}}')
    with announced(tmp_path, settings, {"a": {}}):
        pass
    assert not list(tmp_path.iterdir())
