"""Prompt schedules: files, calls, and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_world import planned, run_inference, save_model, write_config
from sessions_world import Pipelines, num_frames

from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind
from pipelines.prompts.jobs import plan_jobs, plan_scripts
from pipelines.prompts.schedules import OnSwitch, Script, Switch, Timeline, read_schedule
from wan.utils.errors import InputError


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_forms_of_a_file(tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", {"prompt": " a ", "block": 0}, {"prompt": "b", "block": 2})
    prompts = Switch("a", block=0), Switch("b", block=2)
    assert [script.prompts for script in read_schedule(one)] == [prompts]
    many = lines(tmp_path / "b.jsonl", {"prompts": ["a", "b"]}, {"prompts": [{"prompt": "c", "second": 0}]})
    found = read_schedule(many)
    assert [script.prompts for script in found] == [(Switch("a"), Switch("b")), (Switch("c", second=0.0),)]
    assert found[1].where.endswith("line 2")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (["{"], "line 1 is"),
        ([{"prompt": "a"}, {"prompts": ["b"]}], "line 1 is no video of several prompts"),
        ([{"prompt": "a", "frame": 0}, {"prompt": "b"}], "follow each other"),
        ([{"prompt": "a", "frame": 0}, {"prompt": "b", "block": 2}], "all in frames"),
        ([{"prompt": "a", "frame": 0}, {"prompt": "b", "frame": 0}], "follow each other"),
        ([{"prompt": "a", "frame": 2}], "must begin at 0"),
        ([{"prompt": "a", "frame": 0, "block": 0}], "at most one"),
        ([{"prompt": "a", "block": 0.5}], "at most one"),
        ([{"prompt": "a", "frame": True}], "at most one"),
        ([{"prompt": "a", "second": 1e300}], "at most one"),
        ([{"prompt": "a", "colour": 1}], "at most one"),
        ([{"prompt": ""}], "is empty"),
        ([[]], "line 1 is []"),
    ],
)
def test_a_damaged_schedule_is_one_line(records: list[object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(records[0]) if isinstance(records[0], str) else lines(path, *records)
    with pytest.raises(InputError) as error:
        read_schedule(path)
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_when_prompts_begin() -> None:
    timeline = Timeline(3, 21, given_frames=0, stride=4, fps=16)

    def starts(**times: Any) -> list[int]:
        (unit, values), *_ = times.items()
        return timeline.starts([Switch("x", **{unit: value}) for value in values], "x")

    assert starts(frame=[0, 3, 8, 20]) == [0, 3, 6, 18], "a block has the prompt that begins inside of it"
    assert starts(block=[0, 1, 6]) == [0, 3, 18]
    # Latent 2 holds frames 5 to 8, latent 3 those from 9 on.
    assert starts(second=[0.0, 9 / 16]) == [0, 3]
    with pytest.raises(InputError, match="in which the one before it does"):
        starts(second=[0.0, 8 / 16])
    assert starts(second=[0.0, 2.5]) == [0, 9], "frame 40 is of latent 10"
    evenly = [Switch("x")] * 3
    assert timeline.starts(evenly, "x") == [0, 6, 12]
    assert Timeline(3, 21, given_frames=9).starts(evenly, "x") == [0, 12, 15]
    assert Timeline(3, None).starts([Switch("x", frame=0), Switch("y", frame=10**6)], "x") == [0, 999999]


@pytest.mark.parametrize(
    ("timeline", "prompts", "words"),
    [
        (Timeline(3, 21), [0, 21], "begins at latent frame 21, the video ends at 21"),
        (Timeline(3, 21), [0, 2], "in which the one before it does"),
        (Timeline(3, 21), [0, 7, 8], "prompt 3 begins in the block"),
        (Timeline(3, 21, given_frames=9), [0, 6], "inside of the 9 that are given"),
        (Timeline(3, 6), [None] * 3, "3 prompts for 2 blocks"),
        (Timeline(3, None), [None] * 2, "without an end cannot be divided"),
    ],
)
def test_prompts_that_cannot_begin(timeline: Timeline, prompts: list[int | None], words: str) -> None:
    with pytest.raises(InputError, match=words):
        timeline.starts([Switch("x", frame=frame) for frame in prompts], "the file")


def test_a_video_begins_as_that_of_its_first_prompt() -> None:
    scripts = [Script((Switch("a"), Switch(other))) for other in ("b", "c", "b")]
    first, second, third = plan_scripts(scripts, seed=4)
    assert first.seed == second.seed == plan_jobs(["a"], 4)[0].seed != third.seed
    assert len({job.name for job in (first, second, third, *plan_jobs(["a"], 4))}) == 4
    assert first.prompts == scripts[0].prompts and not plan_scripts([Script((Switch("a"),))], 4)[0].prompts


@pytest.mark.parametrize(
    "wrong", [[(1, "a")], [(0, "a"), (0, "b")], [(0, "a"), "b"], [(0,)], [("0", "a")], [(True, "a")]]
)
def test_a_call_with_a_broken_schedule(wrong: Any, pipelines: Pipelines) -> None:
    with pytest.raises(InputError) as error:
        pipelines().stream(wrong, num_frames(9))
    assert "(0, " in str(error.value) or "the first must be 0" in str(error.value)


def test_a_call_with_a_schedule(pipelines: Pipelines) -> None:
    """Up to the switch the frames of the first prompt; after it others, in every video of a batch."""
    pipeline = pipelines(layers=(0, 2))
    options: dict[str, Any] = {
        "seeds": [3, 4],
        "memory": MemoryConfig(MemoryKind.window, 9, 3),
        "output_type": "latent",
    }
    plain = pipeline(["a red shape", "a blue shape"], num_frames(15), **options).frames
    schedule = [(0, ["a red shape", "a blue shape"]), (7, "a shape rolls"), (12, ["a", "red"])]
    found = pipeline(schedule, num_frames(15), **options).frames
    assert torch.equal(found[:, :6], plain[:, :6])
    for video in range(2):
        assert not torch.allclose(found[video, 6:9], plain[video, 6:9], atol=1e-3)
    # Before the last prompt, two schedules that differ only there are the same.
    other = pipeline([*schedule[:2], (12, "a")], num_frames(15), **options).frames
    assert torch.equal(other[:, :12], found[:, :12]) and torch.equal(other[0], found[0])
    assert not torch.allclose(other[1, 12:], found[1, 12:], atol=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("schedules") / "model")


def test_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model, "denoising_steps: [1000]\n")
    path = lines(tmp_path / "s.jsonl", {"prompt": "a red shape", "frame": 0}, {"prompt": "a blue shape", "block": 1})
    refused = run_inference(monkeypatch, config, "--prompt_schedule", path)
    assert refused == 2 and "all in frames" in capsys.readouterr().err
    lines(path, {"prompt": "a red shape", "block": 0}, {"prompt": "a blue shape", "block": 1})
    flags = ("--prompt_schedule", path, "--memory", "full")
    assert run_inference(monkeypatch, config, *flags) == 0
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json"))
    assert record["prompts"] == [{"prompt": "a red shape", "block": 0}, {"prompt": "a blue shape", "block": 1}]
    assert "on_switch" not in record["settings"], "records of earlier versions lack it"
    capsys.readouterr()
    assert run_inference(monkeypatch, config, *flags, "--on_switch", "recompute") == 2
    assert "on_switch was nothing, is recompute" in capsys.readouterr().err
    lines(path, {"prompt": "a red shape", "block": 0}, {"prompt": "a blue shape", "block": 2})
    assert run_inference(monkeypatch, config, *flags) == 2
    assert "begins at latent frame 6, the video ends at 6" in capsys.readouterr().err


def test_what_the_command_line_refuses(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    path = lines(tmp_path / "s.jsonl", {"prompts": ["a", "b"]})
    assert planned(config, "--prompt_schedule", path).jobs[0].prompts == (Switch("a"), Switch("b"))
    anew = "--prompt_schedule", path, "--on_switch", "recompute", "--memory", "window"
    for flags, words in (
        (("--prompt", "x", "--on_switch", "keep"), "on_switch is of a prompt that changes"),
        (("--prompt", "x", "on_switch=recompute"), "on_switch is of a prompt that changes"),
        (("--prompt_schedule", path, "--i2v"), "names no images"),
        ((*anew, "memory.window_frames=5", "memory.sink_frames=0"), "whole blocks of 3 frames"),
        (("--prompt_schedule", tmp_path / "none.jsonl"), "no prompt file"),
    ):
        with pytest.raises(InputError, match=words):
            planned(config, *flags)


def test_an_idle_setting_is_no_part_of_an_identity() -> None:
    assert "on_switch" not in InferenceConfig().identity()
    assert InferenceConfig(on_switch=OnSwitch.recompute).identity()["on_switch"] == "recompute"
