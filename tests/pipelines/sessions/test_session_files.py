"""Files of sessions are untrusted: whatever does not fit is one line, before anything large is allocated."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sessions_world import HEIGHT, Pipelines, build
from torch import Tensor

from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.sessions.files import VERSION
from wan.checkpoints.saving import stored_hash
from wan.utils.errors import CheckpointError, InputError

WINDOW = MemoryConfig(MemoryKind.window, 9, 3)
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def saved(pipelines: Pipelines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of a hybrid after four blocks."""
    path = tmp_path_factory.mktemp("sessions") / "held.safetensors"
    session = pipelines(layers=(0, 2)).session("a red shape", seeds=[3], memory=WINDOW, on_switch="recompute")
    for _ in range(4):
        session.next()
    session.save(path)
    return path


def forged(source: Path, target: Path, change: Change) -> Path:
    """A copy with other content, whose hashes are right."""
    with safe_open(source, "pt") as file:
        record = json.loads(file.metadata()["arl2_session"])
    tensors = load_file(source)
    change(record, tensors)
    if "tensors" in record:
        record["tensors"] = {name: stored_hash(value) for name, value in tensors.items()}
    text = json.dumps(record)
    save_file(tensors, target, {"arl2_session": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    return target


def fact(name: str, value: Any) -> Change:
    return lambda record, tensors: record["facts"].update({name: value})


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda record, tensors: tensors.update({name: change(tensors[name])})


def without(name: str) -> Change:
    def change(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def counter(name: str, value: int) -> Change:
    return lambda record, tensors: record["counters"].update({name: value})


FORGERIES: dict[str, tuple[Change, str]] = {
    "another version": (lambda record, tensors: record.update(version=VERSION + 1), f"of version {VERSION + 1}"),
    "no version": (lambda record, tensors: record.pop("version"), "of version None"),
    "no facts": (lambda record, tensors: record.pop("facts"), "its header lacks"),
    "counters that are no numbers": (counter("memory.1.written", True), "its header lacks"),
    "an unknown fact": (fact("colour", 3), "colour"),
    "a size out of range": (fact("height", 10**9), "height 1000000000 is out of range"),
    "a size that does not divide": (fact("height", HEIGHT + 1), "do not divide into patches"),
    "another size": (fact("height", 16384), "does not fit this pipeline"),
    "another position": (fact("index", 5), "its start_frame contradicts"),
    "another length": (fact("blocks", 3), "its blocks contradicts"),
    "another window": (fact("memory", {"kind": "window", "window_frames": 12, "sink_frames": 3}), "does not fit"),
    "a window of all the world": (
        fact("memory", {"kind": "window", "window_frames": 10**6, "sink_frames": 3}),
        "does not fit",
    ),
    "another kind of memory": (fact("memory", {"kind": "full"}), "does not fit"),
    "a memory that is not resolved": (fact("memory", {"kind": "trained"}), "does not fit"),
    "another switch": (fact("on_switch", "keep"), "past.0.0.state is unknown"),
    "a name too many": (lambda record, tensors: tensors.update(x=torch.zeros(1)), "x is unknown"),
    "a name too few": (without("memory.0.state"), "memory of layer 0 does not fit: state is missing"),
    "no text": (without("text.0"), "text.0 is missing"),
    "two videos": (fact("seeds", [3, 4]), "text.0 is not of 2 videos"),
    "seeds that are none": (fact("seeds", [2**70]), "out of range"),
    "texts that are none": (fact("texts", [{"prompts": ["a", "b"]}]), "text.0 is not of 1 videos"),
    "steps that are none": (fact("sampler", {"timesteps": [1e9], "sigmas": [1.0]}), "timesteps"),
    "steps that do not match": (fact("sampler", {"timesteps": [1000.0, 500.0], "sigmas": [1.0]}), "its sampler"),
    "another shape": (replaced("memory.0.state", lambda x: x[..., :1].contiguous()), "memory of layer 0 does not fit"),
    "another type": (replaced("memory.1.keys", lambda x: x.double()), "memory of layer 1 does not fit"),
    "NaN": (replaced("memory.1.keys", lambda x: x * torch.nan), "memory.1.keys"),
    "latents of another size": (replaced("pending", lambda x: x[..., :1].contiguous()), "not latents of this video"),
    "whole numbers as latents": (replaced("pending", lambda x: x.long()), "not latents of this video"),
    "more tokens than frames": (counter("memory.1.written", 10**12), "is more than the 12 latent frames"),
    "fewer tokens": (counter("memory.1.written", 3), "must hold 3 tokens"),
    "a negative count": (counter("memory.1.written", -1), "written is -1"),
    "an unknown count": (counter("memory.1.read", 1), "its counters are of another session"),
    "a decoder of another size": (replaced("decoder.stream.0", lambda x: x[..., :1].contiguous()), "does not fit"),
    "no decoder's cache": (without("decoder.stream.0"), "does not fit"),
    "states of another size": (replaced("past.0.0.state", lambda x: x[..., :1].contiguous()), "does not fit"),
    "too few recent blocks": (replaced("past.recent", lambda x: torch.cat([x, x], 1)), "recent must hold 3"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_one_line(name: str, saved: Path, pipelines: Pipelines, tmp_path: Path) -> None:
    change, words = FORGERIES[name]
    path = forged(saved, tmp_path / "forged.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        pipelines(layers=(0, 2)).load_session(path)
    message = str(error.value)
    assert words in message and str(path) in message and "\n" not in message, message


def test_an_honest_copy_loads(saved: Path, pipelines: Pipelines, tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    path = forged(saved, tmp_path / "copy.safetensors", lambda record, tensors: None)
    pipelines(layers=(0, 2)).load_session(path).next()


def test_a_damaged_file_is_one_line(saved: Path, pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline, content = pipelines(layers=(0, 2)), saved.read_bytes()
    path = tmp_path / "damaged.safetensors"
    begin = 8 + int.from_bytes(content[:8], "little")
    seeds = content.index(b"seeds")
    flipped = {
        place: bytes([content[place] ^ 1])
        for place in (seeds + 10, begin + 5, (begin + len(content)) // 2, len(content) - 1)
    }
    contents = [content[:place] + byte + content[place + 1 :] for place, byte in flipped.items()]
    contents += [b"", content[:4], content[: begin - 20], content[: len(content) // 2], content[:-1], content + b"x"]
    for number, damaged in enumerate(contents):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            pipeline.load_session(path)
        assert "save the session again" in str(error.value) and "\n" not in str(error.value), (number, error.value)
    with pytest.raises(CheckpointError, match="no session at"):
        pipeline.load_session(tmp_path / "nothing.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no session"):
        pipeline.load_session(path)


def test_another_pipeline_is_named(
    saved: Path, pipelines: Pipelines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = {
        "weights.transformer": pipelines(layers=(0,)),
        "decoder was plain, is fast": pipelines(layers=(0, 2), fast=True),
        "frames_per_block was 3, is 1": pipelines(layers=(0, 2), frames_per_block=1),
        "context_noise was 0.0, is 5.0": pipelines(layers=(0, 2), context_noise=5.0),
    }
    changed = build((0, 2))
    changed.load_session(saved)
    others["dtype was torch.float32, is torch.bfloat16"] = changed.to(torch.bfloat16)
    for part in ("vae", "text_encoder"):
        other = build((0, 2))
        next(getattr(other, part).parameters()).mul_(2)
        others[f"weights.{part}"] = other
    for words, pipeline in others.items():
        with pytest.raises(CheckpointError, match="was saved with other settings") as error:
            pipeline.load_session(saved)
        assert words in str(error.value) and "\n" not in str(error.value), error.value
    without_encoder = build((0, 2))
    without_encoder.text_encoder = without_encoder.tokenizer = None
    session = without_encoder.load_session(saved)
    session.next()
    with pytest.raises(InputError, match="no text encoder"):
        session.switch("a blue shape")
    newer = forged(saved, tmp_path / "newer.safetensors", lambda record, tensors: record["made_on"].update(torch="9.9"))
    pipelines(layers=(0, 2)).load_session(newer)
    assert "not to the same last bits" in caplog.text and "torch was 9.9" in caplog.text


def test_a_target_that_cannot_be_written(pipelines: Pipelines, tmp_path: Path) -> None:
    session = pipelines().session("a red shape", seeds=[3], memory=WINDOW)
    with pytest.raises(InputError, match="let it end in"):
        session.save(tmp_path / "x.pt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="a folder or a device has this name"):
        session.save(tmp_path / "folder.safetensors")
    session.save(tmp_path / "new" / "x.safetensors")
    before = (tmp_path / "new" / "x.safetensors").read_bytes()
    session.save(tmp_path / "new" / "x.safetensors")
    assert before == (tmp_path / "new" / "x.safetensors").read_bytes(), "the same session is the same file"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_a_save_of_fixed_size(pipelines: Pipelines, tmp_path: Path) -> None:
    sizes: dict[str, list[int]] = {}
    for name, layers, memory in (("window", (0, 2), WINDOW), ("full", (), "full")):
        session = pipelines(layers=layers).session("a red shape", seeds=[3], memory=memory)
        for count in range(1, 9):
            session.next()
            if count in (4, 8):
                session.save(tmp_path / "x.safetensors")
                sizes.setdefault(name, []).append((tmp_path / "x.safetensors").stat().st_size)
    assert abs(sizes["window"][1] - sizes["window"][0]) < 100, "but for digits of counters"
    blocks, frames, tokens, layers, width, size = 4, 3, 2, 3, 24, 4
    grown = blocks * frames * tokens * layers * 2 * width * size
    assert abs(sizes["full"][1] - sizes["full"][0] - grown) < 100, "keys and values of the blocks between"
