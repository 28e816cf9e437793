"""inference.py --parallel video: three processes make one video together, and stay together when one of them stops."""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from torch import Tensor
from training_world import start_entry_point

from pipelines.cli import rank_and_world_size
from pipelines.generation.blocks import PIXELS
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.streaming import FiniteCheck
from pipelines.media.video import read_video
from wan.utils.errors import InputError
from wan.vae.fast import FastDecodeStream

PROCESSES = 3
"""The shipped toy model has three heads."""
PROMPTS = "a red square rolls to the right\na blue circle\n"


def run(
    folder: Path, *flags: str, size: int = PROCESSES, before: Callable[[], None] | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit statuses and what was said of processes that make videos together."""
    (folder / "prompts.txt").write_text(PROMPTS)
    config = str(ROOT / "configs" / "toyworld" / "inference.yaml")
    given = [f"model_folder={ROOT / 'models' / 'toyworld'}", "num_output_frames=9", "--device", "cpu"]
    line = ["inference.py", "--config", config, "--data_path", str(folder / "prompts.txt"), *given, *flags]
    processes = start_entry_point(line, folder, size, before)
    for process in processes:
        process.join(240)
    said = [(folder / f"stderr-{rank}.txt").read_text() for rank in range(size)]
    return [process.exitcode for process in processes], said


def frames(path: Path) -> np.ndarray:
    """The frames of a video, [T, H, W, 3]."""
    return read_video(path).astype(float)


def break_first_video() -> None:
    """Let the leading process find pixels that are not finite, once; the others never see pixels."""
    if rank_and_world_size()[0] == 0:
        answers = iter([PIXELS])
        FiniteCheck.first_broken = lambda self: next(answers, None)  # type: ignore[method-assign]


def break_decoder(rank: int, fails: bool) -> None:
    """Let a process's second block have pixels that are not finite, or let its decoder fail there."""
    if rank_and_world_size()[0] == rank:
        blocks, pixels = count(), FastDecodeStream._pixels

        def broken(self: FastDecodeStream, latents_BFCHW: Tensor) -> Tensor:
            is_second = next(blocks) == 1
            if is_second and fails:
                raise InputError("broken")
            return pixels(self, latents_BFCHW) / (0 if is_second else 1)

        FastDecodeStream._pixels = broken  # type: ignore[method-assign]


def give_rank_one(flag: str) -> None:
    if rank_and_world_size()[0] == 1:
        sys.argv.append(flag)


def without_models() -> None:
    CausalVideoPipeline.from_pretrained = None  # type: ignore[method-assign,assignment]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    statuses, said = run(folder, "--output_folder", str(folder / "videos"), "--parallel", "video")
    assert statuses == [0] * PROCESSES, said
    return folder


def test_videos_are_those_of_one_process(together: Path, tmp_path: Path) -> None:
    statuses, said = run(tmp_path, "--output_folder", str(tmp_path / "videos"), size=1)
    assert statuses == [0], said
    names = sorted(path.name for path in (tmp_path / "videos").glob("*.mp4"))
    assert names == sorted(path.name for path in (together / "videos").glob("*.mp4")) and len(names) == 2
    for name in names:
        one, many = frames(tmp_path / "videos" / name), frames(together / "videos" / name)
        assert one.shape == many.shape and np.abs(one - many).mean() < 0.05


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("num_output_frames=12", "num_output_frames is 9 on rank 0 and 12 on rank 1"),
        ("speed.fast_vae=false", "speed.fast_vae is True on rank 0 and False on rank 1"),
        ("--seed=3", "the videos is"),
    ],
)
def test_processes_that_were_not_started_alike_are_refused(flag: str, named: str, tmp_path: Path) -> None:
    """They would wait for each other without end, or make one video of the parts of two."""
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video")
    statuses, said = run(tmp_path, *flags, before=partial(give_rank_one, flag))
    assert statuses == [2] * PROCESSES
    assert all(named in text for text in said), said
    assert not list((tmp_path / "videos").glob("*"))


def test_a_hybrid_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """The fast form merges adapters into the weights: records say what was loaded."""
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video")
    hybrid = ("--checkpoint_path", str(ROOT / "models" / "toyworld" / "hybrid_75.safetensors"))
    assert run(tmp_path, *flags, *hybrid)[0] == [0] * PROCESSES
    records = {path: path.read_bytes() for path in (tmp_path / "videos").glob("*.json")}
    statuses, said = run(tmp_path, *flags, *hybrid, size=1)
    assert statuses == [0], said
    assert {path: path.read_bytes() for path in records} == records


def test_what_is_finished_is_not_made_again(together: Path) -> None:
    records = {path: path.read_bytes() for path in (together / "videos").glob("*.json")}
    missing = max(records)
    missing.unlink()
    missing.with_suffix(".mp4").unlink()
    statuses, said = run(together, "--output_folder", str(together / "videos"), "--parallel", "video")
    assert statuses == [0] * PROCESSES, said
    assert [path.read_bytes() == content for path, content in sorted(records.items())] == [True, False]


def test_all_go_on_together_when_the_leading_process_gives_a_video_up(tmp_path: Path) -> None:
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video")
    statuses, said = run(tmp_path, *flags, before=break_first_video)
    assert statuses == [1, 0, 0], said  # torchrun's processes agree on the worst; these are not torchrun's
    (record,) = (tmp_path / "videos").glob("*.json")
    assert json.loads(record.read_text())["prompt"] == PROMPTS.splitlines()[1]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_band_that_is_not_finite_ends_its_video_and_no_other(rank: int, tmp_path: Path) -> None:
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video")
    statuses, said = run(tmp_path, *flags, before=partial(break_decoder, rank, fails=False))
    assert statuses == [1, 0, 0], said
    (record,) = (tmp_path / "videos").glob("*.json")
    assert json.loads(record.read_text())["prompt"] == PROMPTS.splitlines()[1]


@pytest.mark.parametrize("rank", [0, 2])
def test_none_waits_for_a_process_that_failed_while_it_decoded(rank: int, tmp_path: Path) -> None:
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video")
    statuses, said = run(tmp_path, *flags, before=partial(break_decoder, rank, fails=True))
    assert statuses == [2 if number == rank else 1 for number in range(PROCESSES)], said
    assert all("another process of this run is gone" in text for text in said[:rank] + said[rank + 1 :]), said
    assert not list((tmp_path / "videos").glob("*"))


def test_a_number_of_processes_that_does_not_divide_the_heads_is_one_line(tmp_path: Path) -> None:
    statuses, said = run(tmp_path, "--output_folder", str(tmp_path / "videos"), "--parallel", "video", size=2)
    assert statuses == [2, 2]
    assert all(text.strip() == "error: 3 heads do not divide over 2 processes: start 1 or 3" for text in said), said
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize("flag", ["--shard_weights", "--exchange=peer"])
def test_what_only_gpus_can_do_together_is_refused_before_models_load(flag: str, tmp_path: Path) -> None:
    flags = ("--output_folder", str(tmp_path / "videos"), "--parallel", "video", flag)
    statuses, said = run(tmp_path, *flags, before=without_models)
    assert statuses == [2] * PROCESSES
    assert all("GPUs of one host" in text and text.count("\n") == 1 for text in said), said
