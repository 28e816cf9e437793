"""inference.py from end to end on a toy model, and every bad input: one line that names cause and cure, status 2."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_world import CONFIG, SIZE, run_inference
from paths import ROOT
from PIL import Image

from arl2.rollout import FewStepSampler, SeededNoise, denoise_block, remember_block
from pipelines.cli import choose_device
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.media.video import read_video
from wan.memory import MemorySpec
from wan.utils.errors import InputError


def test_videos_are_written_measured_and_not_made_twice(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    prompts, metrics = tmp_path / "prompts.txt", tmp_path / "metrics"
    prompts.write_text("a red shape\na/../b 🙂\na red shape\n")
    flags = ("--data_path", prompts, "--metrics_dir", metrics, "--memory", "window")
    assert run_inference(monkeypatch, config, *flags) == 0
    videos = sorted((tmp_path / "out").iterdir())
    assert len(videos) == 3 and len({read_video(video).tobytes() for video in videos}) == 3
    assert read_video(videos[0]).shape == (21, 32, 48, 3)
    page = json.loads((metrics / f"{videos[0].stem}.json").read_text())
    assert page["load_seconds"] > 0
    assert page["frames"] == 21 and page["settings"]["memory"]["kind"] == "window"
    assert set(page["seconds"]) == {"text", "denoise", "clean_pass", "vae", "total"}
    parts = sum(page["seconds"][name] for name in ("text", "denoise", "clean_pass", "vae"))
    assert 0 < parts < page["seconds"]["total"] and 0 < page["time_to_first_frame"] < page["seconds"]["total"]
    before = {video: video.stat().st_mtime_ns for video in videos}
    videos[1].unlink()
    assert run_inference(monkeypatch, config, *flags) == 0
    assert {video: video.stat().st_mtime_ns != before[video] for video in videos} == dict(
        zip(videos, (False, True, False), strict=True)
    )


@pytest.mark.parametrize("overlaps", [False, True])
def test_rates_of_parts_are_told_where_they_work_one_after_the_other(
    overlaps: bool, monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "overlaps_decoding", overlaps)
    assert run_inference(monkeypatch, config, "--prompt", "a red shape", "--metrics_dir", tmp_path / "metrics") == 0
    page = json.loads(next((tmp_path / "metrics").iterdir()).read_text())
    assert page["fps"].keys() == ({"end_to_end"} if overlaps else {"end_to_end", "dit", "vae"})


def test_videos_of_other_settings_are_not_taken_for_finished(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference(monkeypatch, config, "--prompt", "x") == 0
    assert run_inference(monkeypatch, config, "--prompt", "x", "--memory", "window") == 2
    assert "memory.kind was full, is window" in capsys.readouterr().err


def test_ranks_make_the_same_videos_as_one_process(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    assert run_inference(monkeypatch, config, "--data_path", prompts, "--output_folder", tmp_path / "single") == 0
    prompts.write_text("three\none\ntwo\n")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run_inference(monkeypatch, config, "--data_path", prompts, "--output_folder", tmp_path / "ranks") == 0
    single, ranks = ({p.name: p.read_bytes() for p in (tmp_path / f).glob("*.mp4")} for f in ("single", "ranks"))
    assert len(single) == 3 and single == ranks


def test_an_image_starts_a_video_of_a_frame_wise_model(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "image.png")
    config.write_text(config.read_text() + "frames_per_block: 1\n")
    flags = ("--i2v", "--image", tmp_path / "image.png", "--prompt", "a shape", "--num_output_frames", "3")
    assert run_inference(monkeypatch, config, *flags) == 0
    assert read_video(next((tmp_path / "out").glob("*.mp4"))).shape == (9, 32, 48, 3)
    assert run_inference(monkeypatch, config, *flags) == 0, "finished"
    assert run_inference(monkeypatch, config, *(flags[3:])) == 2
    assert "image was" in capsys.readouterr().err
    Image.fromarray(np.full((64, 64, 3), 50, np.uint8)).save(tmp_path / "image.png")
    assert run_inference(monkeypatch, config, *flags) == 2
    assert "image was" in capsys.readouterr().err


def bad_inputs(folder: Path, tmp: Path) -> dict[str, tuple[str, list[str | Path], str]]:
    """Name to (config text, flags, what the message must say)."""
    good = CONFIG.format(folder=folder)
    prompt: list[str | Path] = ["--prompt", "x"]
    (tmp / "empty.txt").write_text("\n")
    (tmp / "file").write_text("")
    torch.save({"generator": {"encoder.conv1.weight": torch.zeros(1)}}, tmp / "vae.pt")
    torch.save({"generator": {"patch_embedding.weight": torch.zeros(1)}}, tmp / "short.pt")
    return {
        "malformed config": ("a: [", prompt, "not valid YAML"),
        "a list for a config": ("- a: 1\n", prompt, "it is a list"),
        "unknown key": (good + "shfit: 3\n", prompt, "shfit"),
        "wrong type": (good + "fps: many\n", prompt, "fps"),
        "unknown memory": (good + "memory: {kind: some}\n", prompt, "memory.kind"),
        "missing model folder": ("model_folder: /nowhere\n", prompt, "no model folder"),
        "missing prompt file": (good, ["--data_path", tmp / "none.txt"], "no prompt file"),
        "empty prompt file": (good, ["--data_path", tmp / "empty.txt"], "no prompts"),
        "empty prompt": (good, ["--prompt", " "], "empty"),
        "missing checkpoint": (good, [*prompt, "--checkpoint_path", tmp / "none.pt"], "no checkpoint"),
        "another family": (good, [*prompt, "--checkpoint_path", tmp / "vae.pt"], "a VAE"),
        "missing keys": (good, [*prompt, "--checkpoint_path", tmp / "short.pt"], "the weights hold 0"),
        "layer out of range": (good, [*prompt, "--hybrid_layers", "0", "8"], "out of range"),
        "layer repeated": (good, [*prompt, "--hybrid_layers", "1", "1"], "more than once"),
        "layer not in the weights": (good, [*prompt, "--hybrid_layers", "5"], "not in [5]"),
        "no frames": (good, [*prompt, "--num_output_frames", "0"], "out of range"),
        "i2v with too few frames": (
            good + "frames_per_block: 1\n",
            [*prompt, "--i2v", "--image", tmp / "file", "--num_output_frames", "1"],
            "raise --num_output_frames",
        ),
        "i2v with a video": (good, [*prompt, "--i2v", "--image", tmp / "file", "--video", tmp / "file"], "--i2v"),
        "missing video": (good, [*prompt, "--video", tmp / "none.mp4"], "no video at"),
        "broken video": (good, [*prompt, "--video", tmp / "file"], "cannot be read"),
        "strength without a video": (good, [*prompt, "--strength", "0.5"], "give --video too"),
        "image without i2v": (good, [*prompt, "--image", tmp / "file"], "--i2v"),
        "no GPU": (good, [*prompt, "--device", "cuda:99"], "no GPU"),
        "no such device": (good, [*prompt, "--device", "toaster"], "toaster"),
        "unwritable output": (good, [*prompt, "--output_folder", tmp / "file" / "out"], "cannot write"),
        "steps that rise": (good + "denoising_steps: [250, 500]\n", prompt, "must fall"),
        "unknown backend": (good + "attention_backend: magic\n", prompt, "magic"),
        "window too small": (good + "memory: {kind: window, window_frames: 4, sink_frames: 3}\n", prompt, "window"),
        "no positive rank": (good, [*prompt, "--lora_rank", "0"], "out of range"),
    }


CASES = sorted(bad_inputs(Path(), Path("/tmp")))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_line_and_status_2(
    case: str, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, flags, message = bad_inputs(folder, tmp_path)[case]
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert run_inference(monkeypatch, config, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert "Traceback" not in error and not list(tmp_path.glob("**/*.mp4"))


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match="2 processes cannot share cuda:0"):
        choose_device("cuda:0")
    with pytest.raises(InputError, match="no GPU for cuda:99"):
        choose_device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_sizes_are_checked_before_models_load(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    for change, message in (
        (("height: 32", "height: 40"), "multiple"),
        (("width: 48", "width: 0"), "width 0 is out of range"),
        (("frames: 6", "frames: 7"), "multiple"),
    ):
        text = config.read_text()
        config.write_text(text.replace(*change))
        assert run_inference(monkeypatch, config, "--prompt", "x") == 2
        assert message in capsys.readouterr().err
        config.write_text(text)


def test_a_missing_config_and_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference(monkeypatch, config.with_name("none.yaml"), "--prompt", "x") == 2
    assert "no config file" in capsys.readouterr().err
    usage = shutil.disk_usage(config.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run_inference(monkeypatch, config, "--prompt", "x") == 2
    assert "full" in capsys.readouterr().err


def test_nan_stops_one_video_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("poison\nfine\n")
    encode = CausalVideoPipeline.encode_prompt

    def poisoned(self: CausalVideoPipeline, prompts: list[str]) -> torch.Tensor:
        embedding = encode(self, prompts)
        return embedding * torch.nan if prompts == ["poison"] else embedding

    monkeypatch.setattr(CausalVideoPipeline, "encode_prompt", poisoned)
    assert run_inference(monkeypatch, config, "--data_path", prompts) == 1
    assert "block 0 is not finite" in caplog.text
    assert [path.name.split("-")[0] for path in (tmp_path / "out").glob("*.mp4")] == ["fine"]
    assert not list((tmp_path / "out").glob(".*"))


def test_the_call_equals_the_stream_in_every_output_type(pipeline: CausalVideoPipeline) -> None:
    options = {"num_frames": 21, **SIZE, "seeds": [5]}
    streamed = torch.cat([block.pixels_BTCHW for block in pipeline.stream("a red shape", **options)], dim=1)
    pipeline.set_progress_bar_config(disable=True)
    outputs = {
        kind: pipeline("a red shape", output_type=kind, **options).frames for kind in ("pt", "np", "pil", "latent")
    }
    torch.testing.assert_close(outputs["pt"], streamed / 2 + 0.5)
    assert outputs["np"].shape == (1, 21, 32, 48, 3) and outputs["np"].dtype == np.float32
    assert len(outputs["pil"][0]) == 21 and outputs["pil"][0][0].size == (48, 32)
    assert outputs["latent"].shape == (1, 6, 16, 4, 6)
    with pytest.raises(InputError, match="output_type"):
        pipeline("x", output_type="gif", **options)


def test_a_batch_gives_each_video_what_it_gets_alone(pipeline: CausalVideoPipeline) -> None:
    options = {"num_frames": 21, **SIZE}
    both = [block.latents_BFCHW for block in pipeline.stream(["a red shape", "blue"], seeds=[1, 2], **options)]
    for index, (prompt, seed) in enumerate((("a red shape", 1), ("blue", 2))):
        alone = [block.latents_BFCHW for block in pipeline.stream(prompt, seeds=[seed], **options)]
        torch.testing.assert_close(torch.cat(both, 1)[index : index + 1], torch.cat(alone, 1), rtol=1e-3, atol=1e-3)


def test_seeds_and_embeddings_must_fit(pipeline: CausalVideoPipeline) -> None:
    with pytest.raises(InputError, match="2 seeds for 1 videos"):
        next(pipeline.stream("x", 9, **SIZE, seeds=[1, 2]))
    for shape in ((1, 40, 64), (1, 4, 63)):
        with pytest.raises(InputError, match="with 1 to 32 tokens"):
            next(pipeline.stream(prompt_embeds=torch.zeros(shape), num_frames=9, **SIZE))


def test_the_generator_decides(pipeline: CausalVideoPipeline) -> None:
    def latents(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return next(pipeline.stream("x", 9, **SIZE, generator=generator)).latents_BFCHW

    assert torch.equal(latents(1), latents(1)) and not torch.equal(latents(1), latents(2))


def test_a_windowed_stream_without_end_equals_naive_recomputation(pipeline: CausalVideoPipeline) -> None:
    memory = MemoryConfig(MemoryKind.window, window_frames=7, sink_frames=2)
    stream = pipeline.stream("a red shape", None, **SIZE, seeds=[3], memory=memory)
    streamed = [next(stream).latents_BFCHW for _ in range(5)]
    model, sampler = pipeline.transformer, FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
    text = model.embed_text(pipeline.encode_prompt(["a red shape"]))
    noise = SeededNoise([3], (3, 16, 4, 6), torch.device("cpu"))
    with torch.no_grad():
        for index in range(5):
            # Nothing is carried over: all earlier blocks are remembered afresh by the plain memories.
            spec = MemorySpec(
                1, 6, torch.device("cpu"), torch.float32, 1, window_frames=7, sink_frames=2, differentiable=True
            )
            plain = model.new_memory(spec)
            for earlier, latents in enumerate(streamed[:index]):
                remember_block(model, latents, text, plain, 3 * earlier)
            again = denoise_block(model, sampler, lambda step, i=index: noise(i, step), text, plain, 3 * index)
            torch.testing.assert_close(again, streamed[index], rtol=1e-4, atol=1e-4)


def test_save_pretrained_and_from_pretrained_keep_everything(pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = CausalVideoPipeline.from_pretrained(tmp_path)
    assert again.transformer.hybrid.layers == (0, 1, 2) and again.config.timestep_shift == 5.0
    options = {"num_frames": 9, **SIZE, "seeds": [1]}
    first, second = (next(p.stream("a red shape", **options)).pixels_BTCHW for p in (pipeline, again))
    assert torch.equal(first, second)


def test_verify_script_reports_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = ROOT / "tests" / "golden"
    for name in ("G7_scheduler.json", "G7_scheduler.safetensors"):
        shutil.copy(golden / name, tmp_path)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path)])
    verify = import_module("verify")
    assert verify.main() == 0 and "3 of 3 cases passed" in capsys.readouterr().out
    text = (tmp_path / "G7_scheduler.json").read_text().replace('"shift": 8.0', '"shift": 8.1')
    (tmp_path / "G7_scheduler.json").write_text(text)
    assert verify.main() == 1 and "2 of 3" in capsys.readouterr().out
