"""The benchmark of offloading: rows that a CPU can run, equal frames, and the file that they leave."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pipelines.benchmark import offloading
from pipelines.benchmark.offloading import JSON_FILE, OffloadingBenchmark, run_offloading_benchmark
from wan.utils.errors import InputError
from wan.utils.files import read_json

script = import_module("benchmark_offloading")
TOY = OffloadingBenchmark("toy", 2, 32, 32, latent_frames=6, window_frames=3, sink_frames=0)
CPU = torch.device("cpu")


def test_rows_give_the_frames_of_plain(tmp_path: Path) -> None:
    page = run_offloading_benchmark(TOY, ["model-offload"], CPU, torch.float32, tmp_path)
    assert list(page["rows"]) == ["plain", "model-offload"] and page == read_json(tmp_path / JSON_FILE)
    plain, offloaded = page["rows"].values()
    assert plain["status"] == "ok" and plain["fps"] == pytest.approx(21 / plain["seconds"])
    assert offloaded["greatest_difference"] == 0.0 and 0 < offloaded["first_frame_seconds"] < offloaded["seconds"]


def test_a_row_without_room_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(pipeline: object, device: torch.device) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setitem(offloading.ROWS, "fast", full)
    page = run_offloading_benchmark(TOY, ["fast", "model-offload"], CPU, torch.float32, tmp_path)
    assert page["rows"]["fast"] == {"status": "out of memory"} and page["rows"]["model-offload"]["status"] == "ok"


def test_unknown_rows_are_refused_and_the_script_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no row disk: choose from plain"):
        run_offloading_benchmark(TOY, ["disk"], CPU, torch.float32, tmp_path)
    line = "--size toy --num_hybrid_layers 1 --height 32 --width 32 --latent_frames 3 --rows plain --device cpu"
    monkeypatch.setattr(sys, "argv", ["benchmark_offloading.py", *line.split(), "--output_folder", str(tmp_path)])
    assert script.main() == 0
    assert "plain" in capsys.readouterr().out and (tmp_path / JSON_FILE).is_file()
