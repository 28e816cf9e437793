"""The benchmark of training: what it counts, and what it writes down."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HEIGHT, HYBRID, TOKENS_PER_FRAME, WIDTH, tiny_model, tiny_video
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.stage1 import Stage1, Stage1Settings
from arl2.distillation.stage2 import Stage2, Stage2Settings
from arl2.model import FFNLoRA, HybridSettings
from arl2.ops.compiling import compile_blocks
from arl2.ops.gated_delta import WriteBackend
from pipelines.benchmark import training
from pipelines.benchmark.ceilings import Ceilings
from pipelines.benchmark.training import TrainingRow
from pipelines.benchmark.training_flops import stage1_flops, stage2_flops
from pipelines.benchmark.training_memory import Allocator
from wan.ops.attention import AttentionBackend

benchmark_training = import_module("benchmark_training")

TOKENS = 3 * TOKENS_PER_FRAME


@pytest.mark.parametrize(
    ("stage", "hybrid", "checkpointing"),
    [
        (1, HybridSettings((0, 1, 2)), False),
        (1, HybridSettings((0, 1)), False),
        (2, HYBRID, False),
        (2, HYBRID, True),
        (2, HybridSettings((1,), 3, 6.0, FFNLoRA.ALL), False),
        (2, HybridSettings((1, 2)), False),
    ],
)
def test_operations_of_a_step_are_those_that_torch_counts(
    stage: int, hybrid: HybridSettings, checkpointing: bool
) -> None:
    model, teacher = tiny_model(hybrid).requires_grad_(False), tiny_model()
    model.use_attention_backend(AttentionBackend.MATH)
    model.use_write_backend(WriteBackend.RECURRENT)
    stage2 = Stage2Settings(3, checkpointing=checkpointing)
    objective = Stage1(model, Stage1Settings(3)) if stage == 1 else Stage2(model, stage2)
    for parameter in objective.parameters_to_train().values():
        parameter.requires_grad_(True)
    video = tiny_video(batch=1)
    batch = VideoBatch(video.clean, video.text)
    noise = BatchNoise(torch.rand(1, 3, 1).double(), torch.randn(1, 3, 1, 3, 4, HEIGHT, WIDTH).double())
    with FlopCounterMode(display=False) as text:
        model.embed_text(video.text)
    with FlopCounterMode(display=False) as counter:
        for part in objective.losses(batch, noise):
            part.backward()
    shape = (model, teacher, 3, TOKENS, 3)
    ours = stage1_flops(*shape) if stage == 1 else stage2_flops(*shape, checkpointing)
    assert bool(ours.recomputation.total) == checkpointing
    # The rank-one updates of a write are products of single numbers, which torch does not count: one in a forward,
    # two in a backward.
    updates = 2 * TOKENS * 24 * 12 * 2 * len(hybrid.layers) * (3 + checkpointing)
    assert counter.get_total_flops() - text.get_total_flops() == ours.hardware - updates


class CountedBytes(Allocator):
    """Stands in for a GPU's allocator: a number that every question raises."""

    def __init__(self, device: torch.device) -> None:
        self._now = 0
        super().__init__(device)

    def allocated(self) -> int:
        self._now += 1 << 20  # more than the memories of the toy model take
        return self._now

    def take_peak(self) -> int:
        self.reserved_peak = self._now + 7
        return self._now + 5


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    sizes = "--size toy --height 32 --width 32 --frames 6 --hybrid_layers 6 --lora_rank 2 --steps 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["benchmark_training", *sizes.split(), "--output_folder", str(folder), *flags])
    monkeypatch.setattr(training, "measure_ceilings", lambda *arguments: Ceilings({"a": 2e9, "b": 1e9}, {}))
    return int(benchmark_training.main())


def test_every_row_is_written_down_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Allocator", CountedBytes)
    assert run(monkeypatch, tmp_path, "--rows", "stage1-loop") == 0
    first = json.loads((tmp_path / "training.json").read_text())
    measure, names = training.measure_row, []

    def measure_row(row: TrainingRow, *arguments: Any) -> dict[str, Any]:
        names.append(row.name)
        return measure(row, *arguments)

    monkeypatch.setattr(training, "measure_row", measure_row)
    assert run(monkeypatch, tmp_path, "--rows", "stage1-loop", "stage2-loop-checkpointed") == 0
    results = json.loads((tmp_path / "training.json").read_text())
    assert names == ["stage2-loop-checkpointed"] and results["rows"]["stage1-loop"] == first["rows"]["stage1-loop"]
    for row in results["rows"].values():
        assert row["status"] == "ok" and len(row["losses"]) == 2 and all(row["losses"])
        assert row["seconds"][0] * row["hardware"]["flops_per_second"] == pytest.approx(row["flops"]["hardware"])
        assert row["hardware"]["share_of_matmul"] == row["hardware"]["flops_per_second"] / 2e9
        memory = row["memory"]
        assert memory["report_peak"] >= memory["step_peak"] >= memory["backward_peak"] >= memory["forward_peak"] > 0
        assert memory["reserved_peak"] > 0 and row["bar_memory"]
        # A state is [3 heads, 64, 64]; two softmax layers remember 3 frames of 4 tokens of 192 channels.
        states, keys = 3 * 64 * 64 * 4, 2 * 2 * 12 * 192 * 4
        assert memory["student_memory"] == (8 * states if row["row"]["stage"] == 1 else 6 * states + keys)
    assert results["rows"]["stage1-loop"]["memory"]["observations"] > 0
    hours = results["cost"]["stage2"]["hours_by_videos_per_step"]
    assert hours["1"] * 3600 == pytest.approx(12000 * results["rows"]["stage2-loop-checkpointed"]["seconds"][0])
    assert hours["8"] == 8 * hours["1"]
    assert [row["run"] for row in results["rows"].values()] == [0, 1] and len(results["runs"]) == 2
    assert all("commit" in run and run["ceilings"]["gemm"] for run in results["runs"])
    assert run(monkeypatch, tmp_path, "--seed", "1") == 2, "other settings"


def test_a_row_does_not_inherit_the_peaks_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"max_memory_allocated": 90, "max_memory_reserved": 100}
    for name in peaks:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: peaks[name])
    after = {"max_memory_allocated": 5, "max_memory_reserved": 7}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(after))
    allocator = Allocator(torch.device("cuda"))
    assert allocator.take_peak() == 5 and allocator.reserved_peak == 7


def test_the_parallel_path_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path, "--rows", "stage1", "stage2-checkpointed", "stage1-loop") == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert all(row["status"] == "ok" for row in rows.values())
    assert rows["stage1"]["losses"] == pytest.approx(rows["stage1-loop"]["losses"], rel=1e-3)


def test_long_training_is_measured_at_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for frames in (24, 48):
        folder = tmp_path / str(frames)
        assert run(monkeypatch, folder, "--rows", "stage2-long", "stage2-checkpointed", "--frames", str(frames)) == 0
        page = json.loads((folder / "training.json").read_text())
        rows[frames] = page["rows"]["stage2-long"]
        assert page["cost"]["stage2"]["row"] == "stage2-checkpointed", "another target is no faster way to this one"
    assert all(row["status"] == "ok" and row["flops"]["teacher"]["linear"] == 0 for row in rows.values())
    # Beyond the window, a block costs the same wherever it is.
    per_block = [row["flops"]["model"] / (frames // 3) for frames, row in rows.items()]
    assert per_block[1] / per_block[0] < 1.1
    assert rows[48]["memory"]["student_memory"] == rows[24]["memory"]["student_memory"]


def test_a_row_that_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_blocks", partial(compile_blocks, backend="eager"))
    assert run(monkeypatch, tmp_path, "--rows", "stage1", "stage1-compiled") == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert rows["stage1-compiled"]["losses"] == pytest.approx(rows["stage1"]["losses"], rel=1e-4)


def test_a_row_of_another_kind_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--rows", "stage1") == 0
    file = tmp_path / "training.json"
    page = json.loads(file.read_text())
    page["rows"]["stage1"]["row"]["forward_mode"] = "sequential"
    file.write_text(json.dumps(page))
    assert run(monkeypatch, tmp_path, "--rows", "stage1") == 2
    assert "stage1 measured with other settings (forward_mode was sequential, is parallel)" in capsys.readouterr().err


def test_out_of_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(*arguments: object) -> Iterator[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        yield

    monkeypatch.setattr(Stage2, "losses", losses)
    assert run(monkeypatch, tmp_path, "--rows", "stage2", "stage1") == 0
    results = json.loads((tmp_path / "training.json").read_text())
    assert results["rows"]["stage2"]["status"] == "oom" and "9 GiB" in results["rows"]["stage2"]["error"]
    assert results["rows"]["stage1"]["status"] == "ok" and "stage2" not in results["cost"]


@pytest.mark.parametrize("flags", ["--frames 7", "--hybrid_layers 9", "--steps 0", "--size huge"])
def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    assert run(monkeypatch, tmp_path, *flags.split()) == 2
