"""A finished video is whole and the one that is wanted: damaged ones are made again, others are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_world import names_in, planned, run_inference, videos_in, write_config
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.config import SpeedConfig
from pipelines.generation.arguments import InferenceRun
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.records import identity_of, record_path, video_path, weights_of
from pipelines.generation.run import generate
from wan.utils.errors import InputError
from wan.vae.tiny import TinyDecoder


@pytest.fixture(scope="module")
def made(pipeline: CausalVideoPipeline, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> InferenceRun:
    """A finished run of two videos."""
    config = write_config(tmp_path_factory.mktemp("made"), folder)
    (config.parent / "prompts.txt").write_text("red\nblue\n")
    run = planned(config, "--data_path", config.parent / "prompts.txt")
    assert generate(run, pipeline) == 0
    return run


@pytest.fixture
def run(made: InferenceRun, config: Path) -> InferenceRun:
    """The same run in a folder of its own."""
    shutil.copytree(made.output_folder, config.parent / "out")
    shutil.copy(made.output_folder.parent / "prompts.txt", config.parent)
    return planned(config, "--data_path", config.parent / "prompts.txt")


def _edit_video(edit: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    return lambda video, record: video.write_bytes(edit(video.read_bytes())) and None


def _edit_record(edit: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    return lambda video, record: record.write_bytes(edit(record.read_bytes())) and None


def _edit_facts(**facts: object) -> Callable[[Path, Path], None]:
    def edit(content: bytes) -> bytes:
        record = json.loads(content)
        record["video"] |= facts
        return json.dumps(record).encode()

    return _edit_record(edit)


def _take_the_others(video: Path, record: Path) -> None:
    other = next(path for path in video.parent.glob("*.mp4") if path != video)
    shutil.copy(other, video)


def _take_the_others_record(video: Path, record: Path) -> None:
    other = next(path for path in video.parent.glob("*.json") if path != record)
    shutil.copy(other, record)


def _drop_facts(content: bytes) -> bytes:
    return json.dumps({name: value for name, value in json.loads(content).items() if name != "video"}).encode()


DAMAGES = {
    "an empty video": _edit_video(lambda content: b""),
    "half a video": _edit_video(lambda content: content[: len(content) // 2]),
    "a video without its last byte": _edit_video(lambda content: content[:-1]),
    "a video with one byte changed": _edit_video(lambda content: content[:-100] + b"\x55" + content[-99:]),
    "a video with bytes added": _edit_video(lambda content: content + b"x"),
    "a text": _edit_video(lambda content: b"hello"),
    "zeros": _edit_video(lambda content: bytes(len(content))),
    "another video": _take_the_others,
    "an empty record": _edit_record(lambda content: b""),
    "half a record": _edit_record(lambda content: content[: len(content) // 2]),
    "a record without its last brace": _edit_record(lambda content: content.rstrip()[:-1]),
    "a list": _edit_record(lambda content: b"[]"),
    "null": _edit_record(lambda content: b"null"),
    "a foreign object": _edit_record(lambda content: b'{"name": "x", "settings": 3}'),
    "an empty object": _edit_record(lambda content: b"{}"),
    "bytes": _edit_record(lambda content: b"\xff\xfe\x00"),
    "brackets": _edit_record(lambda content: b"[" * 100_000),
    "another video's record": _take_the_others_record,
    "a record without facts": _edit_record(_drop_facts),
    "a record of another length": _edit_facts(frames=5),
    "a record of another file": _edit_facts(sha256="0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_video_or_record_is_made_again(
    damage: str, run: InferenceRun, pipeline: CausalVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    whole, (broken, other) = videos_in(run.output_folder), run.jobs
    before = video_path(run, other).stat().st_mtime_ns
    DAMAGES[damage](video_path(run, broken), record_path(run, broken))
    assert generate(run, pipeline) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(set(warnings))
    assert warnings and all("made again" in warning and broken.name in warning for warning in warnings)
    assert videos_in(run.output_folder) == whole and names_in(run.output_folder) == {".mp4", ".json"}
    assert video_path(run, other).stat().st_mtime_ns == before, "the whole one stays"
    caplog.clear()
    assert generate(run, pipeline) == 0 and not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_record_says_what_the_file_is(run: InferenceRun) -> None:
    record = json.loads(record_path(run, run.jobs[0]).read_text())
    assert record["video"].keys() == {"frames", "height", "width", "fps", "sha256"}
    assert record["video"]["frames"] == record["frames"] == 21
    assert record["settings"]["weights"].keys() == {"transformer", "vae", "text_encoder", "tokenizer"}


@pytest.mark.parametrize("content", [None, b""])
def test_a_video_without_a_record_is_refused(
    run: InferenceRun, pipeline: CausalVideoPipeline, content: bytes | None
) -> None:
    record_path(run, run.jobs[0]).unlink()
    if content is not None:
        video_path(run, run.jobs[0]).write_bytes(content)
    with pytest.raises(InputError, match="which would say what made it, is not"):
        generate(run, pipeline)


def test_a_damaged_video_of_other_settings_is_refused(
    run: InferenceRun, pipeline: CausalVideoPipeline, config: Path
) -> None:
    for job in run.jobs:
        video_path(run, job).write_bytes(b"")
    other = planned(config, "--data_path", config.parent / "prompts.txt", "--num_output_frames", 9)
    with pytest.raises(InputError, match="num_output_frames was 6, is 9"):
        generate(other, pipeline)
    assert not any(video_path(run, job).stat().st_size for job in run.jobs)


@pytest.mark.parametrize("change", [{"prompt": "violet"}, {"seed": 8}])
def test_a_named_file_of_another_prompt_or_seed_is_refused(
    change: dict[str, object], pipeline: CausalVideoPipeline, config: Path
) -> None:
    request = {"prompt": "green", "seed": 7, "name": "mine"}
    path = config.parent / "named.jsonl"
    path.write_text(json.dumps(request))
    assert generate(planned(config, "--data_path", path), pipeline) == 0
    path.write_text(json.dumps(request | change))
    (name,) = change
    with pytest.raises(InputError, match=f"mine.mp4 was made with other settings .{name} was {request[name]}"):
        generate(planned(config, "--data_path", path), pipeline)


def test_a_record_that_cannot_be_read_is_an_error(
    run: InferenceRun, pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read .*json .Permission denied"):
        generate(run, pipeline)


@pytest.mark.parametrize("path_of", [video_path, record_path])
def test_a_folder_in_the_place_of_a_file_is_an_error_before_anything_is_made(
    path_of: Callable[..., Path], pipeline: CausalVideoPipeline, config: Path
) -> None:
    run = planned(config, "--prompt", "red")
    path_of(run, run.jobs[0]).mkdir()
    with pytest.raises(InputError, match="is a folder"):
        generate(run, pipeline)
    assert len(list(run.output_folder.iterdir())) == 1


def test_all_can_be_made_anew(run: InferenceRun, pipeline: CausalVideoPipeline) -> None:
    whole, before = videos_in(run.output_folder), video_path(run, run.jobs[0]).stat().st_mtime_ns
    record_path(run, run.jobs[0]).unlink()
    assert generate(run, pipeline, anew=True) == 0
    assert videos_in(run.output_folder) == whole and video_path(run, run.jobs[0]).stat().st_mtime_ns > before


def _weights(part: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = next((model / part).glob("*.safetensors"))
        state = load_file(file)
        name = min(name for name in state if state[name].is_floating_point())
        state[name].flatten()[0] += 1
        save_file(state, file, metadata={"format": "pt"})

    return change


def _statistics(model: Path) -> None:
    file = model / "vae" / "config.json"
    config = json.loads(file.read_text())
    config["latents_mean"][3] += 0.5
    file.write_text(json.dumps(config))


def _tokenizer(model: Path) -> None:
    file = model / "tokenizer" / "tokenizer.json"
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    file.write_text(json.dumps(state))


REPLACED = {
    "transformer": _weights("transformer"),
    "vae": _weights("vae"),
    "text_encoder": _weights("text_encoder"),
    "tokenizer": _tokenizer,
    "vae statistics": _statistics,
}


@pytest.mark.parametrize("part", REPLACED)
def test_another_part_at_the_same_path_is_another_model(
    part: str, run: InferenceRun, folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(folder, tmp_path / "elsewhere")
    assert generate(run, CausalVideoPipeline.from_pretrained(model)) == 0, "the same in another place"
    REPLACED[part](model)
    with pytest.raises(InputError, match=f"weights.{part.split()[0]} was"):
        generate(run, CausalVideoPipeline.from_pretrained(model))


def test_the_same_model_in_another_place_is_the_same(
    monkeypatch: pytest.MonkeyPatch, run: InferenceRun, folder: Path, config: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.output_folder.iterdir()}
    model = shutil.copytree(folder, tmp_path / "elsewhere")
    flags = ("--data_path", tmp_path / "prompts.txt", "--hybrid_layers", 2, 0, 1)
    flags += ("--checkpoint_path", shutil.copytree(model / "transformer", tmp_path / "weights"))
    assert run_inference(monkeypatch, write_config(tmp_path, model), *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in run.output_folder.iterdir()} == before


def test_a_tiny_decoder_is_known_by_its_content(pipeline: CausalVideoPipeline, config: Path, tmp_path: Path) -> None:
    def save(name: str, seed: int) -> SpeedConfig:
        torch.manual_seed(seed)
        torch.save(TinyDecoder(16, (8, 8, 8, 8)).state_dict(), tmp_path / name)
        return SpeedConfig(tiny_vae=str(tmp_path / name))

    identities = []
    for name, seed in (("a.pth", 0), ("b.pth", 0), ("b.pth", 1)):
        speed = save(name, seed)
        pipeline.optimize_for_inference(speed)
        run = planned(config, "--prompt", "red", "--tiny-vae", speed.tiny_vae)
        identities.append(identity_of(run, pipeline))
    pipeline.optimize_for_inference(SpeedConfig())
    assert identities[0] == identities[1] != identities[2]
    assert "tiny_vae" not in weights_of(pipeline)


def test_tokens_that_were_cut_do_not_change_a_tokenizer(pipeline: CausalVideoPipeline) -> None:
    before = weights_of(pipeline)
    pipeline.tokenizer(["red blue"], padding="max_length", truncation=True, max_length=3)
    assert weights_of(pipeline) == before


def test_an_image_is_known_by_its_content(
    pipeline: CausalVideoPipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, folder, "frames_per_block: 1\n")
    framewise = CausalVideoPipeline(**pipeline.components, frames_per_block=1)

    def attempt(name: str, grey: int) -> int:
        Image.fromarray(np.full((64, 64, 3), grey, np.uint8)).save(tmp_path / name)
        flags = ("--i2v", "--image", tmp_path / name, "--prompt", "red", "--num_output_frames", 3)
        return generate(planned(config, *flags), framewise)

    assert attempt("a.png", 200) == attempt("b.png", 200) == 0
    with pytest.raises(InputError, match="image was"):
        attempt("a.png", 50)
