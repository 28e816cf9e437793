"""The benchmark: what it counts, what it writes down, and what it does when memory runs out."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from PIL import Image
from tiny_models import HEIGHT, HYBRID, TOKENS_PER_FRAME, WIDTH, new_memory, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_world import start_entry_point

from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.ops.gated_delta import WriteBackend
from pipelines.benchmark import cases, ceilings, measure, suite
from pipelines.benchmark.cases import BenchmarkConfig, QuickConfig, RowConfig, plan_cases, quick, select
from pipelines.benchmark.ceilings import Ceilings
from pipelines.benchmark.flops import Flops, pass_flops, rollout_flops
from pipelines.benchmark.profile import OWN, kind_of
from pipelines.benchmark.report import charts, markdown
from pipelines.config import MemoryKind
from pipelines.generation.blocks import NonFiniteBlockError
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.records import Records
from pipelines.settings import load_config
from wan.ops.attention import AttentionBackend
from wan.utils.errors import InputError
from wan.utils.locks import exclusive

benchmark = import_module("benchmark")
TOY_CONFIG = str(ROOT / "configs/toyworld/benchmark.yaml")

CPU = torch.device("cpu")
CEILINGS = Ceilings({"a": 2e9, "b": 1e9}, {"a": 1e9})


def small(**changes: Any) -> BenchmarkConfig:
    """Two toy rows at one length, a second or two in all."""
    rows = [RowConfig("softmax", 0, MemoryKind.full), RowConfig("hybrid", 6, MemoryKind.window)]
    config = BenchmarkConfig(size="toy", height=16, width=16, window_frames=6, sink_frames=0, rows=rows, lengths=[21])
    config = replace(config, repeats=1, warmup_blocks=1, lora_rank=2, quick=QuickConfig(["hybrid"], [9]))
    return replace(config, **changes)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measure_ceilings", lambda *arguments: CEILINGS)


def run(folder: Path, config: BenchmarkConfig, **options: Any) -> dict[str, Any]:
    return suite.run_benchmark(config, CPU, torch.float32, folder, **options)


@pytest.mark.parametrize("remember", [False, True], ids=["denoise", "clean"])
@pytest.mark.parametrize("layers", [(), (0, 2), (0, 1)], ids=["softmax", "hybrid ends", "softmax ends"])
def test_operations_are_those_that_torch_counts(layers: tuple[int, ...], remember: bool) -> None:
    model = tiny_model(HybridSettings(layers, 3, 6.0, FFNLoRA.NONE)).requires_grad_(False)
    model.use_attention_backend(AttentionBackend.MATH)
    model.use_write_backend(WriteBackend.RECURRENT)
    memory = new_memory(model, batch=1)
    latents, text = torch.randn(1, 3, 4, HEIGHT, WIDTH).double(), model.embed_text(torch.randn(1, 5, 12).double())
    tokens = 3 * TOKENS_PER_FRAME
    for block in range(2):
        arguments = (latents, torch.ones(1, 3).double(), text, memory.read(tokens), torch.arange(3) + 3 * block)
        with FlopCounterMode(display=False) as counter:
            output = model(*arguments, remember=remember)
        ours = pass_flops(model, 3, tokens, (block + 1) * tokens, remember)
        # The rank-one updates of a write are products of single numbers, which torch does not count.
        updates = 2 * tokens * 24 * 12 * len(layers) if remember else 0
        assert counter.get_total_flops() == ours.total - updates
        memory.commit(output.updates or model(*arguments, remember=True).updates)
    assert bool(ours.state) == bool(layers)


def test_operations_of_a_video_are_those_of_its_passes() -> None:
    model = tiny_model(HYBRID)
    reads = [pass_flops(model, 3, 18, keys, remember=False) for keys in (18, 36, 36)]
    writes = [pass_flops(model, 3, 18, keys, remember=True) for keys in (18, 36)]
    expected = sum((read * 4 for read in reads), Flops()) + sum(writes, Flops())
    assert rollout_flops(model, 3, 18, window=36, steps=4, blocks=3) == expected
    assert rollout_flops(model, 3, 18, window=None, steps=4, blocks=3).attention > expected.attention
    assert CEILINGS.least_seconds(Flops(linear=2, attention=3, state=4)) == pytest.approx(6e-9)


def test_a_benchmark_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["softmax-full", "hybrid-75-window"]
    flags = ["--config", TOY_CONFIG, "--device", "cpu", "--output_folder", str(tmp_path)]
    flags += ["--rows", *rows, "--lengths", "21", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    assert benchmark.main() == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [record["case"]["row"] for record in results["records"]] == rows
    for record in results["records"]:
        assert record["status"] == "ok" and len(record["repeats"]) == 2
        for repeat in record["repeats"]:
            columns = repeat["metrics"]
            assert columns["total_seconds"] > columns["dit_seconds"] + columns["vae_seconds"]
            assert columns["total_seconds"] > columns["mp4_seconds"] > 0
            assert columns["total_seconds"] > columns["first_frame_seconds"] > 0
            assert columns["fps"] * columns["total_seconds"] == pytest.approx(21)
            assert columns["dit_fps"] * columns["dit_seconds"] == pytest.approx(21)
            assert columns["dit_seconds"] > sum(seconds for _, seconds in repeat["dit_block_seconds"]) > 0
            operations = columns["flops_per_second"] * columns["dit_seconds"]
            assert operations == pytest.approx(sum(record["flops"].values()))
        values = sorted(repeat["metrics"]["dit_seconds"] for repeat in record["repeats"])
        summary = record["summary"]["dit_seconds"]
        assert summary == {"median": pytest.approx(sum(values) / 2), "least": values[0], "greatest": values[1]}
    environment = results["runs"][0]
    assert environment["versions"]["torch"] and {"commit", "cudnn", "nvidia_smi", "ceilings"} <= environment.keys()
    page = (tmp_path / "benchmark.md").read_text()
    assert all(f"| {row} | 21 |" in page for row in rows) and "OOM" not in page
    for chart in ("fps", "dit_fps", "block_latency"):
        assert Image.open(tmp_path / f"{chart}.png").size > (100, 100)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"benchmark.json", "benchmark.md", "fps.png", "dit_fps.png", "block_latency.png"}


def test_a_record_of_an_older_version_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, select(small(vae=False), ["softmax"], None))
    path = tmp_path / "benchmark.json"
    results = json.loads(path.read_text())
    del results["records"][0]["case"]["ranks"], results["records"][0]["case"]["speed"]["exchange"]
    path.write_text(json.dumps(results))
    monkeypatch.setattr(suite, "measure_case", None)
    records = run(tmp_path, select(small(vae=False), ["softmax"], None))["records"]
    assert [record["case"]["ranks"] for record in records] == [1]


def test_several_processes_measure_videos_that_they_compute_together(tmp_path: Path) -> None:
    line = ["scripts/benchmark.py", "--config", TOY_CONFIG, "--device", "cpu", "--output_folder", str(tmp_path)]
    line += ["--rows", "hybrid-75-window", "--lengths", "21", "--repeats", "1", "width=48"]
    processes = start_entry_point(line, tmp_path, 3)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * 3
    (record,) = json.loads((tmp_path / "benchmark.json").read_text())["records"]
    assert record["case"]["ranks"] == 3 and record["status"] == "ok"
    assert record["summary"]["fps"]["median"] > 0
    assert "| hybrid-75-window (3 GPUs) | 21 |" in (tmp_path / "benchmark.md").read_text()


def test_processes_that_the_heads_do_not_divide_over_are_one_clear_line(tmp_path: Path) -> None:
    line = ["scripts/benchmark.py", "--config", TOY_CONFIG, "--device", "cpu", "--output_folder", str(tmp_path)]
    processes = start_entry_point(line, tmp_path, 2)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [2, 2]
    said = (tmp_path / "stderr-0.txt").read_text()
    assert said.strip() == "error: 3 heads do not divide over 2 processes: start 1 or 3"


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, select(small(vae=False), ["softmax"], None))
    measured = []

    def note(build: Any, config: Any, case: cases.Case, *arguments: Any) -> dict[str, Any]:
        measured.append((case.row, case.vae))
        return {"case": {**vars(case)}, "status": "oom", "reached_frames": 0, "error": "", "summary": {}}

    monkeypatch.setattr(suite, "measure_case", note)
    monkeypatch.setattr(Records, "save", lambda records: None)
    assert len(run(tmp_path, small(vae=False))["records"]) == 2
    assert measured == [("hybrid", False)]
    run(tmp_path, small())
    assert measured[1:] == [("softmax", True), ("hybrid", True)], "with and without the VAE are different cases"
    run(tmp_path, select(small(vae=False), ["softmax"], None), again=True)
    assert measured[3:] == [("softmax", False)]
    with pytest.raises(InputError, match=r"seed was 0, is 1\): give another --output_folder"):
        run(tmp_path, small(seed=1))
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(InputError, match=r"benchmark\.json is not valid JSON"):
        run(tmp_path, small())
    with exclusive(tmp_path / ".benchmark.json.lock", "x"), pytest.raises(InputError, match="in use by process"):
        run(tmp_path, small())


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom", "**OOM**"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "oom", "**OOM**"),
        (NonFiniteBlockError(1), "failed", "**failed**"),
    ],
)
def test_a_row_that_breaks_off_says_so_and_the_next_goes_on(
    error: RuntimeError, status: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = CausalVideoPipeline.stream

    def breaks(self: CausalVideoPipeline, prompt: Any, frames: int, *arguments: Any, **options: Any) -> Iterator[Any]:
        for block in stream(self, prompt, frames, *arguments, **options):
            if frames == 21 and block.index and not self.transformer.hybrid.layers:
                raise error
            yield block

    monkeypatch.setattr(CausalVideoPipeline, "stream", breaks)
    results = run(tmp_path, small())
    broken, whole = results["records"]
    assert (broken["status"], broken["reached_frames"], broken["repeats"]) == (status, 9, [])
    assert whole["status"] == "ok"
    page = markdown(results)
    assert f"| softmax | 21 | {word} after 9 frames |" in page and f"full KV: {word}" in page
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"], "no half a video is left"
    with pytest.raises(RuntimeError, match="illegal"):
        monkeypatch.setattr(suite, "build_stage", lambda *a: (_ for _ in ()).throw(RuntimeError("illegal address")))
        run(tmp_path, small(), again=True)


def test_without_the_vae_only_the_transformer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.vae.wan_vae.DecodeStream.decode", None)
    monkeypatch.setattr("pipelines.benchmark.measure.VideoWriter", None)
    results = run(tmp_path, small(vae=False))
    assert "hybrid (DiT only)" in markdown(results)
    for record in results["records"]:
        assert "vae_seconds" not in record["summary"] and record["summary"]["dit_fps"]["median"] > 0


def test_a_decoder_beside_the_transformer_leaves_only_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "overlaps_decoding", True)
    results = run(tmp_path, small())
    for record in results["records"]:
        assert record["summary"].keys() >= {"fps", "total_seconds", "mp4_seconds", "first_frame_seconds"}
        assert not record["summary"].keys() & {"dit_fps", "vae_fps", "share_of_ceiling", "last_blocks_median"}
    assert re.search(r"\| hybrid \| 21 \| – \| – \| [0-9.]+ \| [0-9.]+ \| – \| – \| [0-9.]+ \|", markdown(results))
    drawn = charts(results["records"])
    assert drawn["fps"][0].keys() == {"softmax", "hybrid"} and not drawn["dit_fps"][0] and not drawn["block_latency"][0]


def test_rows_measured_in_other_ways_are_compared_in_what_they_share(tmp_path: Path) -> None:
    run(tmp_path, select(small(vae=False), ["softmax"], None))
    comparison = markdown(run(tmp_path, select(small(), ["hybrid"], None))).partition("## Against softmax")[2]
    assert re.search(r"\| hybrid \| 21 \| [0-9.]+× \(DiT only\) \| – \| – \| [+-][0-9.]+% \|", comparison)
    results = run(tmp_path, select(small(), ["softmax"], None))
    comparison = markdown(results).partition("## Against softmax")[2]
    assert re.search(r"\| hybrid \| 21 \| [0-9.]+× \| [0-9.]+× \|", comparison), "its like is preferred"
    drawn = charts(results["records"])
    whole = results["records"][-1]["summary"]
    assert drawn["dit_fps"][0]["softmax"] == [(21.0, whole["dit_fps"]["median"])], "the one with the VAE"
    assert drawn["fps"][0].keys() == {"softmax", "hybrid"}


def test_samples_cover_a_video_and_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = select(small(blocks_sampled=2), ["softmax"], [141]), []
    forward = HybridWanModel.forward

    def note(self: HybridWanModel, latents: Any, timesteps: Any, text: Any, views: Any, *rest: Any, **more: Any) -> Any:
        seen.append(views[0].visible // (3 * self.tokens_per_frame(*config.latent_size)))
        return forward(self, latents, timesteps, text, views, *rest, **more)

    monkeypatch.setattr(HybridWanModel, "forward", note)
    results = run(tmp_path, config)
    record = results["records"][0]
    assert "softmax (sampled: 4 blocks at each of 2 places, integrated)" in markdown(results)
    places = [block for block, _ in record["repeats"][0]["dit_block_seconds"]]
    assert places == [0, 1, 2, 3, 7, 8, 9, 10], "the last of 12 blocks is not remembered"
    # Five passes a block, less the clean pass that the last one of each rollout does without.
    passes = {first: [block + 1 for block in range(first, first + 5) for _ in range(5)][:-1] for first in (0, 7)}
    warm_up, filling = [1] * 4, [5]
    assert seen == [*warm_up, *passes[0], *filling, *passes[7]]
    assert charts(results["records"])["dit_fps"][0].keys() == {"softmax"}
    with pytest.raises(InputError, match="do not fit the 2 blocks"):
        plan_cases(small(blocks_sampled=2))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3x", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("triton_poi_fused_add_mul_3", "compiled"),
        ("_norm_heads_kernel", "kernels of our own"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "writes to states"),
        ("triton_poi_fused_convolution_silu_7", "compiled"),
        ("fused_recurrent_gated_delta_rule_fwd_kernel", "writes to states"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "others"),
        ("_rotate_kernel", "kernels of our own"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::elementwise_kernel<128, 4>", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_kernel_of_ours_is_known_as_one() -> None:
    sources = [source for folder in ("arl2", "wan") for source in (ROOT / folder).rglob("*_triton.py")]
    names = {
        name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.MULTILINE)
    }
    assert {kind_of(name) for name in names} == {"kernels of our own"} and len(names) == len(OWN)


def test_a_profile_names_what_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", TOY_CONFIG, "--row", "hybrid-75-window", "--frames", "21", "--device", "cpu", "--no_vae"]
    monkeypatch.setattr(sys, "argv", ["profile", *flags, "--json", str(tmp_path / "profile.json")])
    assert import_module("profile_generation").main() == 0
    result = json.loads((tmp_path / "profile.json").read_text())
    assert result["kinds"]["products"]["seconds"] > 0 and result["kinds"]["attention"]["count"] > 0
    assert result["seconds"] == pytest.approx(sum(kind["seconds"] for kind in result["kinds"].values()))
    # Two blocks of four and five passes; eight layers that attend twice, but for the last one of the clean pass.
    attended = [
        kernel["count"] for kernel in result["kernels"] if kernel["name"] == "aten::scaled_dot_product_attention"
    ]
    assert attended == [(9 * 8 - 1) * 2]
    assert "products" in capsys.readouterr().out


def test_integration_is_exact_on_straight_lines() -> None:
    points = [(block, 2.0 + 3 * block) for block in (0, 1, 5, 9)]
    assert measure.integrate(points, 10) == pytest.approx(sum(2 + 3 * block for block in range(10)))
    assert measure.sampled_places(334, 3) == [0, 164, 329]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [80]}, "80 frames cannot be decoded"),
        ({"lengths": [85]}, "do not divide into blocks"),
        ({"lengths": []}, "nothing to measure"),
        ({"repeats": 0}, "repeats 0 is out of range: give an integer from 1"),
        ({"blocks_sampled": 1}, "give an integer from 2"),
        ({"rows": [RowConfig("a", 9)]}, "9 hybrid layers, but the model has 8"),
        ({"rows": [RowConfig("a"), RowConfig("a")]}, "same name"),
        ({"window_frames": 2}, "cannot hold a block"),
        ({"height": 24}, "do not divide into patches"),
        ({"size": "2B"}, "one of 1.3B, 14B, toy"),
    ],
)
def test_what_cannot_be_measured_is_found_first(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_cases(replace(small(), **changes))


def test_filters() -> None:
    assert [(case.row, case.frames) for case in plan_cases(quick(small()))] == [("hybrid", 9)]
    assert [case.frames for case in plan_cases(select(small(), ["softmax"], [9, 33]))] == [9, 33]
    with pytest.raises(InputError, match=r"no row 'none': choose from softmax, hybrid"):
        select(small(), ["none"], None)


@pytest.mark.parametrize("path", ["configs/benchmark.yaml", "configs/toyworld/benchmark.yaml"])
def test_the_configs_that_come_with_the_project(path: str) -> None:
    config = load_config(BenchmarkConfig, ROOT / path)
    planned = plan_cases(config)
    assert len(planned) == 7 * len(config.lengths) and plan_cases(quick(config))
    softmax, *_, hybrid = cases.by_row(planned).values()
    if config.size == "1.3B":
        assert config.lengths == [81, 249, 501, 921, 1005, 4005]
        size = [cases.memory_bytes(config, row[-1], torch.bfloat16) for row in (softmax, hybrid)]
        assert size == [1002 * 1560 * 30 * 2 * 1536 * 2, 30 * 12 * 128 * 128 * 4]


def test_ceilings_are_rates_of_the_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_second(function: Callable[[], torch.Tensor], device: torch.device) -> float:
        assert 6 in function().shape
        return 0.5

    assert ceilings._seconds(lambda: None, CPU) > 0
    monkeypatch.setattr(ceilings, "_seconds", half_a_second)
    model = cases.empty_model(small(), plan_cases(small())[0])
    measured = ceilings.measure_ceilings(model, tokens=6, window=12, device=CPU, dtype=torch.float32)
    products = {"dim→dim": 192 * 192, "dim→3·dim": 192 * 576, "dim→ffn": 192 * 768, "ffn→dim": 768 * 192}
    assert measured.gemm == {name: 2 * 2 * 6 * size for name, size in products.items()}
    assert {"auto, 6 keys", "math, 48 keys"} <= measured.attention.keys()
    assert measured.attention["math, 48 keys"] == 2 * 4 * 6 * 48 * 192


@pytest.mark.gpu
def test_on_a_gpu_memory_is_measured_too(tmp_path: Path) -> None:
    results = suite.run_benchmark(small(repeats=2), torch.device("cuda", 0), torch.bfloat16, tmp_path)
    for record in results["records"]:
        assert record["status"] == "ok"
        assert record["summary"]["peak_bytes"]["median"] >= record["summary"]["steady_bytes"]["median"] > 0
        assert len(record["repeats"][0]["allocated_bytes_after_block"]) == 2
    assert "memory" in {name for name, (series, *_) in charts(results["records"]).items() if series}
