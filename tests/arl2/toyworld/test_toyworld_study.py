"""The study of distillation: its data, its exam, and the whole chain from a teacher to tables, in miniature."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arl2.checkpoint import build_hybrid, read_generator
from arl2.distillation.data import ResidentLatents
from arl2.distillation.sampling import Batches, NoiseLevels
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.probe import memory_benchmark as benchmark_module
from arl2.toyworld.probe.memory_benchmark import (
    MemoryBenchmark,
    MemoryBenchmarkSettings,
    equal_memory_window,
)
from arl2.toyworld.probe.memory_probe import judge_every_pass, make_probe_set
from arl2.toyworld.study.rows import MAIN, PARTS, Kind, Window, row_for
from arl2.toyworld.world.captions import VOCABULARY
from arl2.toyworld.world.latents import toy_text_encoder
from arl2.toyworld.world.reader import read_video
from arl2.toyworld.world.render import as_pixels, render
from arl2.toyworld.world.scenes import sample_scenes
from pipelines.config import InferenceConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.toyworld.table import kept_share, read_results, shown
from wan.config import wan_size
from wan.utils.errors import InputError
from wan.utils.locks import exclusive
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae

study_script, probe_memory = import_module("toyworld_study"), import_module("probe_memory")
SAMPLER = FewStepSampler.from_steps([1000], 5.0)
VAE = TOY_VAE | {"dim": 2, "num_res_blocks": 1}
SMALL = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 4, "freq_dim": 16, "text_dim": 64, "text_len": 32}


def test_resident_samples_come_as_they_were_kept(tmp_path: Path) -> None:
    file, latents, text = tmp_path / "x.safetensors", torch.randn(6, 6, 4, 2, 2), torch.randn(6, 3, 8)
    save_file({"latents": latents.half(), "text": text.half()}, file)
    data = ResidentLatents(file, torch.device("cpu"))
    batch, noise = Batches(data, 0, 4, 3, NoiseLevels(), SAMPLER, 5.0)(1, range(4))
    assert len(data) == 6 and batch.latents_BFCHW.dtype == torch.float32 and noise.levels_BNP.shape == (4, 2, 1)
    rows = [int((latents.half().float() == one).flatten(1).all(1).nonzero()) for one in batch.latents_BFCHW]
    assert torch.equal(batch.text_BTD, text.half().float()[rows])
    assert torch.equal(data[rows[0]][0], batch.latents_BFCHW[0])
    before = data.fingerprint()
    save_file({"latents": latents.half() + 1, "text": text.half()}, file)
    assert ResidentLatents(file, torch.device("cpu")).fingerprint() != before
    for wrong in ({"latents": latents}, {"latents": latents, "text": text[:3]}, {"latents": latents[0], "text": text}):
        save_file({name: value.contiguous() for name, value in wrong.items()}, file)
        with pytest.raises(InputError, match="holds"):
            ResidentLatents(file, torch.device("cpu"))


def test_every_pass_of_a_long_real_video_is_right() -> None:
    scenes = sample_scenes(torch.arange(3), mix={"occlusion": 0.5, "binding": 0.5})
    reading = read_video(as_pixels(render(scenes, torch.arange(333))), scenes)
    page = judge_every_pass(reading, scenes)
    passes = page["passes"]
    assert isinstance(passes, list) and len(passes) >= 4
    for one in (*passes, page["after_last"]):
        assert one["both"]["accuracy"] == 1.0
    assert page["after_last"]["both"]["objects"] == int(scenes.exists.sum())  # type: ignore[index]


def test_an_exam_compares_what_has_one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(benchmark_module, "LONG_TIMES", 2)
    model = HybridWanModel(**SMALL)
    exam = MemoryBenchmark(
        WanVAE(new_vae(VAE)), toy_text_encoder(), EvalSetup(model, SAMPLER), MemoryBenchmarkSettings(2, 1, 1)
    )
    page = exam.take(EvalSetup(model, SAMPLER))
    assert set(page) == set(benchmark_module.FORMS)
    for form, blocks in (("continued", 5), ("generated", 7), ("long", 12)):
        deviation = page[form]["deviation"]
        assert deviation["latent_mse"] < 1e-9 and len(deviation["latent_mse_by_block"]) == blocks
    monkeypatch.setattr(benchmark_module, "FORMS", ("generated", "long"))
    exam.settings = replace(exam.settings, long_videos=0)
    other = exam.take(EvalSetup(model, SAMPLER, window_frames=3))
    assert other["generated"]["deviation"]["latent_mse_by_block"][0] < 1e-9, "nothing to remember in the first block"
    assert min(other["generated"]["deviation"]["latent_mse_by_block"][1:]) > 1e-9


def test_noise_does_not_depend_on_how_many_videos_are_made_at_a_time() -> None:
    probe = make_probe_set(WanVAE(new_vae(VAE)), toy_text_encoder(), 2, 0, 27)
    assert torch.equal(probe.noise(True, 3, 1), probe.noise(True, 3, 1))
    different = [probe.noise(*key) for key in ((True, 3, 1), (False, 3, 1), (True, 2, 1), (True, 3, 0))]
    assert len({float(noise.sum()) for noise in different}) == 4


def test_windows_of_equal_memory() -> None:
    size = wan_size("toy")
    full = HybridWanModel(**size)
    hybrid = HybridWanModel(**size, hybrid_layers=list(range(6)))
    video, tokens = (21, 8, 12, torch.bfloat16), 24
    wanted = hybrid.memory_bytes(*video)
    window = equal_memory_window(full, 6, 21, tokens)
    got, less = (full.memory_bytes(*video, window_frames=frames) for frames in (window, window - 3))
    assert window == 9 and less < wanted <= got
    all_hybrid = HybridWanModel(**size, hybrid_layers=list(range(8)))
    sizes = [all_hybrid.memory_bytes(21 * times, *video[1:]) for times in (1, 4)]
    assert sizes == [8 * 3 * 64 * 64 * 4] * 2


def test_rows_are_told_apart() -> None:
    rows = [row for part in PARTS.values() for row in part]
    assert len({row.name for row in rows}) == len(rows)
    assert {row.of for row in rows if row.kind in (Kind.RAW, Kind.AGAIN)} == {MAIN}
    assert all((row.window is not Window.FULL) for row in rows if row.kind is Kind.WINDOW)
    frames = {window: (window.frames(9, 21), window.sink_frames) for window in Window}
    assert frames == {
        Window.FULL: (None, 0),
        Window.OWN_BLOCK: (3, 0),
        Window.EQUAL: (9, 0),
        Window.EQUAL_WITH_SINK: (9, 3),
        Window.TRAINED: (21, 0),
    }
    assert row_for([1, 3]).name == "layers_1-3" and row_for([1, 3]).layers == (1, 3)


def test_figures_are_kept_above_chance() -> None:
    def page(accuracy: float) -> list[dict[str, object]]:
        both = {"accuracy": accuracy, "chance": 0.1, "interval": [0, 1]}
        return [{"exam": {"continued": {"after": {"both": both}}}}]

    results = {"teacher": page(0.9), "x": page(0.5)}
    assert kept_share(results, "x") == pytest.approx([0.5]) and kept_share({"x": page(0.5)}, "x") == []
    assert shown([0.5]) == "0.500" and shown([0.25, 0.75], 2) == "0.50 (0.25–0.75)" and shown([]) == "–"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a small transformer and a small VAE, untrained."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = random_pipeline("toy", vae_config=VAE, words=VOCABULARY)
    pipeline.register_modules(transformer=HybridWanModel(**SMALL))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Callable[..., int]:
    """Calls the script."""

    def call(*flags: str) -> int:
        fixed = {"work": tmp_path, "model": model_folder, "device": "cpu", "steps": 2, "stage1_steps": 1, "videos": 2}
        fixed |= {"long_videos": 0, "training_videos": 2}
        torch.set_num_threads(1)
        given = [text for name, value in fixed.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["toyworld_study.py", *given, "--set", "batch=1", *flags])
        return study_script.main()

    return call


def test_the_chain_from_a_teacher_to_tables(
    run: Callable[..., int],
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--part", "ratios", "--only", MAIN) == 2 and "--part stage1 first" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run("--part", "stage1") == 0
    study = tmp_path / "study"
    assert run("--part", "ratios", "--only", MAIN, "--budget_seconds", "0") == 0
    assert not (study / "results" / f"{MAIN}.json").exists() and (study / "runs" / MAIN / "checkpoints").is_dir()
    with exclusive(study / "locks" / MAIN, MAIN):
        assert run("--part", "ratios", "--only", "teacher", MAIN) == 0
        assert not (study / "results" / f"{MAIN}.json").exists(), "another process is at it"
    assert run("--part", "ratios", "--only", "teacher", MAIN) == 0
    assert run("--part", "window", "--only", "window_sink", "hybrid_75_trained_window") == 0
    assert run("--part", "table", "export") == 0

    page = json.loads((study / "results" / f"{MAIN}.json").read_text())
    assert page["training"]["steps"] == 2 and len(page["row"]["layers"]) == 3
    assert page["exam"]["continued"]["deviation"]["latent_mse"] > 0
    teacher = json.loads((study / "results" / "teacher.json").read_text())
    assert teacher["exam"]["generated"]["deviation"]["latent_mse"] == 0
    windows = {"window_sink", "hybrid_75_trained_window"}
    assert read_results(study / "results").keys() == {"stage1", "teacher", MAIN, *windows}
    assert f"| {MAIN} |" in (study / "tables.md").read_text() and (study / "accuracies.png").is_file()
    assert not (study / "runs" / MAIN / "checkpoints").exists(), "only the weights stay"
    exported = read_generator(model_folder, study / "export" / f"{MAIN}.safetensors")
    hybrid, report = build_hybrid(exported, {}, HybridSettings(), dtype=torch.float32, device=torch.device("cpu"))
    assert list(report.settings.layers) == page["row"]["layers"] and not report.untrained
    kept = load_file(study / "weights" / f"{MAIN}.safetensors")
    assert all(torch.equal(value.float(), dict(hybrid.named_parameters())[key]) for key, value in kept.items())
    pipeline = CausalVideoPipeline.from_pretrained(model_folder)
    also = [f"{MAIN}={study / 'export' / MAIN}.safetensors"]
    rows = probe_memory.eval_setups(pipeline, InferenceConfig(model_folder=str(model_folder)), None, also)
    assert list(rows) == ["teacher", "local_only", "window_sink", MAIN] and rows[MAIN].transformer.hybrid.layers
    with pytest.raises(InputError, match="NAME=WEIGHTS"):
        probe_memory.eval_setups(pipeline, InferenceConfig(model_folder=str(model_folder)), None, ["x"])

    def none(*arguments: object) -> None:
        raise AssertionError("what is done is not done again")

    monkeypatch.setattr("pipelines.toyworld.study.new_trainer", none)
    monkeypatch.setattr("pipelines.toyworld.study.MemoryBenchmark.take", none)
    assert run("--part", "stage1", "ratios", "--only", MAIN) == 0
    for flags, message in (
        (("--part", "ratios", "--videos", "3"), "exam.videos was 2, is 3"),
        (("--part", "ratios", "--steps", "3"), "steps was 2, is 3"),
        (("--part", "stage1", "--stage1_steps", "3"), "steps was 1, is 3"),
    ):
        assert run(*flags, "--only", MAIN) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (study / "results" / f"{MAIN}.json").write_text('{"exam"')
    assert run("--part", "ratios", "--only", MAIN) == 2
    assert "is not valid JSON" in " ".join(capsys.readouterr().err.split())


def test_layers_are_chosen_by_every_method(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--part", "stage1") == 0
    chosen = "layers_0-1"  # no method need choose it: then the script says which there are
    run("--part", "selection", "--only", chosen, "--steps", "1")
    page = json.loads((tmp_path / "study" / "results" / "selection.json").read_text())
    assert set(page["sets"]) == {"stage1_error", "replacement", "gates", "random_0", "random_1", "random_2"}
    assert all(len(layers) == 2 for layers in page["sets"].values())
    assert page["rows"]["stage1_error"] == "hybrid_50", "trained there, and not again"
    assert all(name in ("hybrid_50", row_for(page["sets"][method]).name) for method, name in page["rows"].items())


def test_what_cannot_work_is_said(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (("--part", "window", "--only", "nothing"), "no row 'nothing'"),
        (("--part", "table"), "no results"),
        (("--part", "export", "--only", "no_gate"), "export a plain hybrid"),
        (("--part", "data", "--videos", "1"), "from 2 to 100000"),
    ):
        assert run(*flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())
