"""The trainer: what it trains, how it survives, what it leaves, and what it refuses."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from abandoned import abandoned
from paths import ROOT
from safetensors.torch import load_file
from tiny_models import HEIGHT, TINY, WIDTH
from torch import Tensor
from training_world import CONFIG, build_world, command, losses, one_line, run_and_kill, weights
from training_world import run as start_and_wait

import inference
import train_stage1
import train_stage2
from arl2.checkpoint import build_hybrid
from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import LatentWriter
from arl2.distillation.sampling import Batches, LevelSource, NoiseLevels
from arl2.distillation.stage1 import Stage1, stage1_parameters
from arl2.distillation.stage2 import stage2_parameters
from arl2.distillation.trainer import OptimizerSettings, products_in_tf32
from arl2.model import HybridSettings, HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.rollout import FewStepSampler
from arl2.trained_memory import TrainedMemory
from pipelines.generation.random_model import random_pipeline
from pipelines.media.video import read_video
from pipelines.settings import load_config
from pipelines.training.config import GatesConfig, Stage1Config, Stage2Config
from wan.checkpoints.formats import read_transformer
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE

convert_checkpoint = import_module("convert_checkpoint")
STAGES = {1: train_stage1, 2: train_stage2}


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world in which stage 1 was run to its end."""
    root = build_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert train(monkeypatch, root, 1) == 0
    return root


def train(monkeypatch: pytest.MonkeyPatch, root: Path, stage: int, *settings: str) -> int:
    torch.set_num_threads(1)  # as started processes have it: the same bits, and no thread waits for another
    monkeypatch.setattr(sys, "argv", command(root, stage, *settings))
    return STAGES[stage].main()


def test_stage_one_leaves_everything_a_run_should(trained_world: Path) -> None:
    run = trained_world / "run"
    page = json.loads((run / "run.json").read_text())
    assert page["config"]["steps"] == 6 and page["world_size"] == 1 and page["versions"]["torch"] == torch.__version__
    lines = losses(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(line["loss"] > 0 for line in lines)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    report = json.loads((run / "reports" / "step-00000003.json").read_text())
    assert set(report["layers"]["relative_error"]) == {"0", "1", "2"}
    saved = load_file(run / "checkpoints" / "step-00000006" / "trainables.safetensors")
    for folder, average in (("export", False), ("export_ema", True)):
        weights = read_transformer(run / folder)
        model, loaded = build_hybrid(weights, {}, HybridSettings(), dtype=torch.float32, device=torch.device("cpu"))
        assert loaded.settings.layers == (0, 1, 2) and not loaded.untrained
        assert model.trained_memory == TrainedMemory(num_frames=9)
        assert saved.keys() == stage1_parameters(model).keys()
        same = all(torch.equal(value, weights.state[name]) for name, value in saved.items())
        assert same != average
        teacher = read_transformer(trained_world / "model").state
        assert all(torch.equal(value, weights.state[name]) for name, value in teacher.items()), "untouched bit for bit"


def test_stage_two_starts_from_the_layers_of_stage_one(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained_world / "run2"
    settings = (f"run_folder={run}", f"init_from={trained_world / 'run'}", "steps=1", "optimizer.lr=1e-12")
    memory = ("memory.kind=window", "memory.window_frames=6", "memory.sink_frames=3")
    assert train(monkeypatch, trained_world, 2, *settings, *memory, "checkpointing=true") == 0
    assert "UNTRAINED" not in caplog.text  # of what training starts from, or stage 1 gave
    before = load_file(trained_world / "run" / "checkpoints" / "step-00000006" / "trainables.safetensors")
    after = load_file(run / "checkpoints" / "step-00000001" / "trainables.safetensors")
    for name, value in before.items():
        assert (name in after) == (".1." not in name[:9])
        if name in after:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    exported = read_transformer(run / "export")
    assert exported.config["hybrid_layers"] == [0, 2] and exported.config["lora_alpha"] == 6.0
    model, _ = build_hybrid(exported, {}, HybridSettings(), dtype=torch.float32, device=torch.device("cpu"))
    assert after.keys() == stage2_parameters(model).keys()
    assert model.trained_memory == TrainedMemory(6, 3, num_frames=9)


@pytest.mark.parametrize("stage", [1, 2])
def test_training_takes_the_mark_of_untrained_layers_off(
    stage: int, trained_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    weights = read_transformer(trained_world / "model")
    rank = {1: None, 2: 4}[stage]
    model, _ = build_hybrid(weights, {}, HybridSettings((0, 1, 2), rank), dtype=torch.float32, device=cpu)
    model.save_pretrained(tmp_path / "converted")
    caplog.clear()
    settings = [f"run_folder={tmp_path / 'run'}", f"checkpoint_path={tmp_path / 'converted'}", "steps=1"]
    settings += ["init_from=null", "hybrid_layers=[0,1,2]", "lora_rank=4", "lora_alpha=32.0"] if stage == 2 else []
    assert train(monkeypatch, trained_world, stage, *settings) == 0
    exported = read_transformer(tmp_path / "run" / "export")
    assert not exported.record.get("untrained_layers") and not exported.config.get("untrained_layers")
    build_hybrid(exported, {}, HybridSettings(), dtype=torch.float32, device=cpu)
    assert "UNTRAINED" not in caplog.text


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_compiles_the_teacher_alone(trained_world: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Reports, samples of other sizes and a second session included."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal graphs
        assert not torch.is_grad_enabled(), "the student was compiled"
        graphs += 1
        return graph.forward

    monkeypatch.setattr("pipelines.training.run.compile_blocks", partial(compile_blocks, backend=backend))
    settings = ["forward_mode=parallel", "levels.per_block=1", "batch=2", "report_every=1", "save_every=1"]
    settings += ["checkpointing=true"] if stage == 2 else []
    runs = []
    for compile in ("false", "true"):
        torch.compiler.reset()
        runs.append(trained_world / f"compiled-{stage}-{compile}")
        for steps in ("steps=1", "steps=1"):  # the second finds everything done
            folder = f"run_folder={runs[-1]}"
            assert train(monkeypatch, trained_world, stage, *settings, steps, folder, f"compile={compile}") == 0
        assert (graphs > 0) == (compile == "true")
    assert losses(runs[0])[0]["loss"] == pytest.approx(losses(runs[1])[0]["loss"], rel=1e-5)


def test_frozen_weights_in_bfloat16_train_and_their_export_keeps_every_type(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [trained_world / f"half-{checkpointing}" for checkpointing in ("false", "true")]
    for run in runs:
        settings = (f"run_folder={run}", "dtype=bfloat16", "steps=2", f"checkpointing={run.name[5:]}")
        start_and_wait(trained_world, 2, *settings)  # a process has one precision
    plain, checkpointed = (losses(run) for run in runs)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)  # sums of bfloat16, in another order
    exported = read_transformer(runs[0] / "export").state
    trained = load_file(runs[0] / "checkpoints" / "step-00000002" / "trainables.safetensors")
    for name, value in exported.items():
        assert value.dtype is (torch.float32 if name in trained else torch.bfloat16)
    for source, target in (("export", "arl2.pt"), ("arl2.pt", "again")):
        flags = ["--config", str(runs[0] / "export"), "--lora_alpha", "6"]
        monkeypatch.setattr(sys, "argv", ["convert", str(runs[0] / source), str(runs[0] / target), *flags])
        assert convert_checkpoint.main() == 0
        weights = read_transformer(runs[0] / target).state
        assert weights.keys() == exported.keys()
        for name, value in exported.items():
            assert weights[name].dtype is value.dtype and torch.equal(weights[name], value), name
    names = torch.load(runs[0] / "arl2.pt", weights_only=True)["generator"]
    assert {"model.blocks.0.self_attn.lora_q_A", "model.blocks.2.ffn.2.linear.weight"} <= names.keys()
    again = HybridWanModel.from_pretrained(runs[0] / "again")
    assert again.hybrid.layers == (0, 2) and again.hybrid.lora_alpha == 6.0


def test_the_paths_of_a_stage_train_alike(trained_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(monkeypatch, trained_world, 1, f"run_folder={trained_world / 'parallel'}", "path=parallel") == 0
    for one, other in zip(losses(trained_world / "run"), losses(trained_world / "parallel"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_accumulation_is_a_larger_batch(trained_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (f"run_folder={trained_world / 'accumulated'}", "batch=1", "accumulation=2", "blocks_per_graph=3")
    assert train(monkeypatch, trained_world, 1, *settings) == 0
    for one, other in zip(losses(trained_world / "run"), losses(trained_world / "accumulated"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = build_world(tmp_path)
    broken = root / "broken"
    run_and_kill(root, broken, stage)
    # What a kill in the middle of a write leaves.
    half = abandoned(broken / "checkpoints" / "step-00000006")
    half.mkdir(parents=True)
    (half / "trainables.safetensors").write_bytes(b"half")
    with (broken / "losses.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert train(monkeypatch, root, stage, f"run_folder={broken}") == 0
    assert train(monkeypatch, root, stage) == 0
    assert losses(broken) == losses(root / "run")
    assert weights(broken, 6) == weights(root / "run", 6)


def test_another_config_or_other_data_do_not_resume(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LatentWriter(trained_world / "other", {"made": "for tests"}) as writer:
        for seed in (0, 1, 2, 3, 9):
            latents, text = torch.zeros(9, TINY["in_dim"], HEIGHT, WIDTH), torch.zeros(4, TINY["text_dim"])
            writer.add(str(seed), latents, f"prompt {seed}", seed, text)
    cases = {
        "(data_samples was": (f"data=[{trained_world / 'other'}]",),
        "optimizer.lr was 0.01, is 0.02": ("optimizer.lr=0.02", "seed=0"),
        "(global_batch was 2, is 1)": ("batch=1",),
        "(global_batch is batch × accumulation × processes)": ("batch=3",),
        "set resume=true": ("resume=false",),
    }
    page = next(trained_world.rglob("run.json"))
    before = page.read_text()
    for message, settings in cases.items():
        assert train(monkeypatch, trained_world, 1, *settings) == 2
        assert message in one_line(capsys)
        assert page.read_text() == before, "it still tells of the run whose checkpoints are there"
    assert train(monkeypatch, trained_world, 1, "batch=1", "accumulation=2", "keep=1") == 0, "the same batch in all"


def test_a_step_that_is_not_finite_is_skipped_and_too_many_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, honest = build_world(tmp_path), Stage1.losses
    bad, calls = {2, 4, 5}, iter(range(1, 100))

    def losses_of(self: Stage1, *arguments: object) -> Iterator[Tensor]:
        broken = next(calls) in bad
        for part in honest(self, *arguments):  # type: ignore[arg-type]
            yield part * float("nan") if broken else part

    monkeypatch.setattr(Stage1, "losses", losses_of)
    assert train(monkeypatch, root, 1, "max_bad_steps=2", "save_every=1", "keep=9") == 2
    assert "not finite in the last 2 steps (now 5)" in one_line(capsys)
    assert [line["skipped"] for line in losses(root / "run")] == [0, 1, 1, 2, 3]
    assert losses(root / "run")[1]["loss"] is None
    first, second, third = (weights(root / "run", step) for step in (1, 2, 3))
    assert first == second and all(second[name] != third[name] for name in second)
    progress = json.loads((root / "run" / "checkpoints" / "step-00000005" / "state.json").read_text())["progress"]
    assert progress == {"step": 5, "skipped": 3, "skipped_in_row": 2}


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_world / "full"
    assert train(monkeypatch, trained_world, 1, f"run_folder={run}", "optimizer.decay=constant", "steps=2") == 0
    before = weights(run, 2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limit[1]))  # what is written beyond fails, as on a full disk
    try:
        status = train(monkeypatch, trained_world, 1, f"run_folder={run}", "optimizer.decay=constant", "steps=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2 and "cannot write" in one_line(capsys)
    assert weights(run, 2) == before and len(list((run / "checkpoints").iterdir())) == 1


def test_people_see_plots_and_videos_and_the_export_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4}).save_pretrained(tmp_path / "model")
    with LatentWriter(tmp_path / "data", {}) as writer:
        writer.add("0", torch.randn(6, 16, 4, 6), "a red shape", 0, torch.randn(32, 64))
    (tmp_path / "stage2.yaml").write_text(CONFIG.format(root=tmp_path) + "hybrid_layers: [1, 3]\n")
    settings = ("steps=1", "batch=1", "report_every=1", "sample_every=1", "context=student", "target=x0")
    assert train(monkeypatch, tmp_path, 2, *settings) == 0
    run = tmp_path / "run"
    assert read_video(run / "samples" / "step-00000001.mp4").shape == (21, 32, 96, 3), "teacher beside student"
    assert (run / "losses.png").is_file() and (run / "reports" / "step-00000001.png").is_file()
    (tmp_path / "inference.yaml").write_text(f"model_folder: {tmp_path / 'model'}\nheight: 32\nwidth: 48\n")
    flags = ["--config_path", tmp_path / "inference.yaml", "--output_folder", tmp_path / "videos", "--prompt", "x"]
    flags += ["--checkpoint_path", run / "export", "--num_output_frames", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, flags)])
    assert inference.main() == 0 and len(list((tmp_path / "videos").glob("*.mp4"))) == 1


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        (1, "stepz=3", "stepz"),
        (1, "steps=0", "steps 0 is out of range"),
        (1, "steps=many", "steps"),
        (1, "layers=[7]", "out of range"),
        (1, "data=[nowhere]", "generate_latents"),
        (1, "model_folder=nowhere", "no model folder"),
        (1, "checkpoint_path=nowhere", "no checkpoint"),
        (1, "frames_per_block=2", "do not divide"),
        (1, "run_folder=/proc/run", "cannot write"),
        (1, "tracker=paper", "tensorboard"),
        (1, "shard=true", "torchrun"),
        (1, "ema_decay=1.5", "ema_decay"),
        (1, "levels.per_block=5", "more than the generator's 4 steps"),
        (1, "forward_mode=parallel levels.per_block=2", "one level per block"),
        (1, "forward_mode=sequential compile=true", "compiled anew"),
        (1, "path=parallel blocks_per_graph=1", "blocks_per_graph"),
        (1, "optimizer.decay=steep", "one of constant, cosine"),
        (1, "dtype=float16", "one of bfloat16, float32"),
        (2, "hybrid_layers=[]", "layers_file"),
        (2, "hybrid_layers=[] layers_file=none.yaml", "no layers file"),
        (2, "init_from=nowhere", "train_stage1.py"),
        (2, "lora_rank=0", "lora_rank 0 is out of range"),
    ],
)
def test_bad_settings_are_found_before_models_load(
    trained_world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    setting: str,
    message: str,
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("pipelines.training.run.read_transformer", load)
    assert train(monkeypatch, trained_world, stage, *setting.split()) == 2
    assert message in one_line(capsys)


def test_data_of_another_shape_is_found_before_models_load(
    trained_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = json.loads((trained_world / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_dim": 16}))
    assert train(monkeypatch, trained_world, 1, f"model_folder={tmp_path}") == 2
    assert "does not fit a model of 16 channels" in one_line(capsys)


def test_layers_come_from_a_file_by_share(trained_world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text('"50": [1]\n"75": [0, 1]\n')
    settings = ["hybrid_layers=[]", f"layers_file={tmp_path / 'layers.yaml'}", "share=50", "lora=false", "steps=1"]
    assert train(monkeypatch, trained_world, 2, *settings, f"run_folder={tmp_path / 'run'}") == 0
    names = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "trainables.safetensors").keys()
    assert {name.split(".")[1] for name in names} == {"1"} and not any("lora" in name for name in names)


def test_batches_depend_on_seed_step_and_place_alone(trained_world: Path) -> None:
    data = LatentDataset([trained_world / "data"])
    sampler = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
    batches = Batches(data, 1, 4, 3, NoiseLevels(per_block=3), sampler, 5.0)
    whole, noise = batches(7, range(4))
    part, part_noise = batches(7, [2, 3])
    assert torch.equal(whole.latents_BFCHW[2:], part.latents_BFCHW) and torch.equal(whole.text_BTD[2:], part.text_BTD)
    assert torch.equal(noise.noise_BNPFCHW[2:], part_noise.noise_BNPFCHW)
    assert torch.equal(noise.levels_BNP[2:], part_noise.levels_BNP)
    other = replace(batches, seed=2)(7, range(4))[1]
    assert not torch.equal(noise.noise_BNPFCHW, batches(8, range(4))[1].noise_BNPFCHW)
    assert not torch.equal(noise.noise_BNPFCHW, other.noise_BNPFCHW)
    assert noise.levels_BNP.shape == (4, 3, 3) and noise.noise_BNPFCHW.shape == (4, 3, 3, 3, 4, 4, 6)
    # Drawn without putting back, and all of the list in the end.
    assert all(len(set(levels.tolist())) == 3 for levels in noise.levels_BNP.flatten(0, 1))
    assert {round(x, 6) for x in noise.levels_BNP.flatten().tolist()} == {round(x, 6) for x in sampler.sigmas}
    # Every epoch sees every sample once, in an order of its own.
    epochs = [[batches.sample_at(5 * epoch + place) for place in range(5)] for epoch in range(3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    uniform = replace(batches, levels=NoiseLevels(LevelSource.UNIFORM, 200))(0, [0])[1].levels_BNP
    assert uniform.min() > 0 and uniform.max() < 1
    # u = (σ / s) / (1 - (1 - 1/s)·σ) is uniform again.
    assert ((uniform / 5) / (1 - 0.8 * uniform)).mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = OptimizerSettings(lr=1.0, warmup_steps=3)
    rates = [settings.lr_at(step, 13) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[8] == pytest.approx(0.5) and 0 < rates[12] < 0.03
    assert replace(settings, decay="constant").lr_at(12, 13) == 1.0


def test_products_are_in_tf32_only_where_wanted_and_only_inside() -> None:
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    with pytest.raises(KeyError), products_in_tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with products_in_tf32(False):
        assert torch.get_float32_matmul_precision() == before


def test_a_config_of_the_project_names_known_settings_only() -> None:
    configs = ROOT / "configs"
    for kind, stage in ((Stage1Config, "stage1"), (Stage2Config, "stage2"), (GatesConfig, "gates")):
        for path in (*configs.glob(f"{stage}*.yaml"), configs / "toyworld" / f"{stage}.yaml"):
            config = load_config(kind, path)
            config.objective_settings()
            config.hybrid(40)


def test_a_student_has_the_memory_of_its_config() -> None:
    file = ROOT / "configs" / "stage2.yaml"
    assert load_config(Stage2Config, file).objective_settings().window == (None, 0)
    windowed = load_config(Stage2Config, file, ["memory.kind=window", "memory.window_frames=6"])
    assert windowed.objective_settings().window == (6, 3)
    with pytest.raises(InputError, match="window"):
        load_config(Stage2Config, file, ["memory.kind=window", "memory.window_frames=5"]).objective_settings()
