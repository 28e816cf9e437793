"""Training data: written whole or not at all, resumed, divided over ranks, and refused when damaged."""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from abandoned import abandoned
from safetensors.torch import load_file, save_file

from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import INDEX, LOCK, LatentWriter, SampleInfo
from arl2.rollout import GeneratedBlock
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE

generate_latents = import_module("generate_latents")
SETTINGS = {"steps": [1000, 500], "name": "x"}


def fill(folder: Path, keys: list[str], per_shard: int = 2) -> None:
    with LatentWriter(folder, SETTINGS, per_shard) as writer:
        for key in keys:
            if key not in writer.keys:
                seed = int(key)
                writer.add(
                    key, torch.full((3, 2, 4, 4), float(seed)), f"prompt {seed % 2}", seed, torch.ones(5, 6) * seed
                )


def test_what_is_written_is_read_and_prompts_are_embedded_once(tmp_path: Path) -> None:
    fill(tmp_path, ["0", "1", "2", "3", "4"])
    data = LatentDataset([tmp_path])
    assert len(data) == 5 and len(list(tmp_path.glob("shard-*"))) == 3 and len(list((tmp_path / "text").iterdir())) == 2
    for index in range(5):
        latents, text = data[index]
        assert latents.shape == (3, 2, 4, 4) and (latents == index).all() and (text == index % 2).all()


def killed_while_writing(folder: Path, samples: int, per_shard: int = 2) -> None:
    """Add samples in a process that ends without a word."""
    if os.fork() == 0:
        writer = LatentWriter(folder, SETTINGS, per_shard)
        writer.__enter__()
        for seed in range(samples):
            writer.add(str(seed), torch.zeros(3, 2, 4, 4), "p", seed, torch.ones(1, 1))
        os._exit(0)
    os.wait()


def keys(folder: Path) -> list[str]:
    return [sample["key"] for sample in json.loads((folder / INDEX).read_text())["samples"]]


def test_a_writer_that_was_killed_goes_on(tmp_path: Path) -> None:
    killed_while_writing(tmp_path, 3)
    assert (tmp_path / LOCK).exists(), "the dead hold no lock"
    abandoned(tmp_path / "shard-00001.safetensors").write_bytes(b"half")
    assert keys(tmp_path) == ["0", "1"], "the third waited in memory"
    fill(tmp_path, ["0", "1", "2", "3"])
    assert keys(tmp_path) == ["0", "1", "2", "3"]
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_no_index_names_yet_is_found(tmp_path: Path) -> None:
    killed_while_writing(tmp_path, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"samples": []}))  # killed between shard and index
    with LatentWriter(tmp_path, SETTINGS) as writer:
        assert not writer.missing([SampleInfo("1", "p", 1)], prune=False)
    assert keys(tmp_path) == ["1"] and len(LatentDataset([tmp_path])[0][0]) == 3


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, SETTINGS) as first:
        with pytest.raises(InputError, match=rf"{tmp_path} is in use by process {os.getpid()}"):
            fill(tmp_path, ["0"])
        first.add("1", torch.zeros(3, 2, 4, 4), "p", 1, torch.ones(1, 1))
    fill(tmp_path, ["0"])
    assert keys(tmp_path) == ["1", "0"]


def test_an_interrupted_writer_keeps_what_waits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LatentWriter(tmp_path, SETTINGS) as writer:
        writer.add("0", torch.zeros(3, 2, 4, 4), "p", 1, torch.ones(1, 1))
        raise KeyboardInterrupt
    assert keys(tmp_path) == ["0"]


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "gone", "folder"])
@pytest.mark.parametrize("kind", ["shard-00001", "text/*"])
def test_damage_is_found_when_writing_goes_on(tmp_path: Path, kind: str, damage: str) -> None:
    fill(tmp_path, ["0", "1", "2", "3"])
    file = sorted(tmp_path.glob(f"{kind}.safetensors"))[0]
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"cut": content[:-1], "empty": b"", "header": b"\xff" * 8 + content[8:]}[damage])
    with LatentWriter(tmp_path, SETTINGS) as writer:
        lost = {"0", "1", "2", "3"} - writer.keys
        assert len(lost) == 2
        wanted = [SampleInfo(key, f"prompt {int(key) % 2}", int(key)) for key in "0123"]
        assert {sample.key for sample in writer.missing(wanted, prune=False)} == lost
    fill(tmp_path, ["0", "1", "2", "3"])
    data = LatentDataset([tmp_path])
    values = {key: float(data[index][0].mean()) for index, key in enumerate(keys(tmp_path))}
    assert values == {"0": 0, "1": 1, "2": 2, "3": 3}
    assert all(path.is_file() for path in tmp_path.glob("shard-*"))


def test_a_pruned_data_set_is_one_made_from_nothing(tmp_path: Path) -> None:
    def make(folder: Path, listed: list[tuple[str, str, int]]) -> LatentWriter:
        wanted = [SampleInfo(key, prompt, 0, content=str(value)) for key, prompt, value in listed]
        with LatentWriter(folder, SETTINGS, samples_per_shard=2) as writer:
            for sample in writer.missing(wanted, prune=True):
                there = writer.has_latents(sample)
                encoded.extend([] if there else [sample.content])
                latents = None if there else torch.full((3, 2, 4, 4), float(sample.content))
                text = torch.full((1, 1), float(len(sample.prompt)))
                writer.add(sample.key, latents, sample.prompt, 0, text, content=sample.content)
        return writer

    encoded: list[str] = []
    make(tmp_path / "a", [("a", "red", 1), ("b", "blue", 2), ("c", "red", 3), ("d", "green", 4), ("e", "red", 5)])
    encoded.clear()
    now = [("x", "green", 4), ("e", "red", 5), ("b", "navy", 2), ("a", "red", 6), ("y", "red", 5), ("n", "red", 7)]
    # 4 is there under another name, 2 with another caption, "a" has other content, 5 comes twice, 3 goes.
    writer = make(tmp_path / "a", now)
    assert encoded == ["6", "7"] and writer.counts == (1, 3, 2, 2)
    assert str(writer.counts) == "1 kept, 3 new, 2 replaced, 2 removed"
    make(tmp_path / "b", now)
    again, fresh = LatentDataset([tmp_path / "a"]), LatentDataset([tmp_path / "b"])
    assert again.fingerprint() == fresh.fingerprint() and keys(tmp_path / "a") == [key for key, _, _ in now]
    for number in range(len(now)):
        assert all(torch.equal(*pair) for pair in zip(again[number], fresh[number], strict=True))
    for folder in ("a", "b"):
        stored = [name for shard in (tmp_path / folder).glob("shard-*") for name in load_file(shard)]
        assert sorted(stored) == [f"latents.{value}" for value in (2, 4, 5, 6, 7)]
        assert len(list((tmp_path / folder / "text").iterdir())) == 3
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert make(tmp_path / "a", now).counts == (6, 0, 0, 0)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_text_encoder_that_was_replaced_leaves_no_embeddings(tmp_path: Path) -> None:
    for number, encoder in enumerate(("one", "other")):
        with LatentWriter(tmp_path, {"size": 3}, pending=("text_encoder",)) as writer:
            writer.complete({"text_encoder": encoder})
            assert writer.text("p") is None
            writer.add("0", torch.zeros(3, 2, 4, 4), "p", 0, torch.full((1, 1), float(number)))
        assert float(LatentDataset([tmp_path])[0][1]) == number
        (tmp_path / INDEX).unlink()  # the folder is otherwise refused


def test_settings_that_follow_are_compared_when_they_are_known(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, {"size": 3}, pending=("vae",)) as writer:
        writer.complete({"vae": "abc"})
        writer.add("0", torch.zeros(3, 2, 4, 4), "p", 0, torch.zeros(1, 1))
    with pytest.raises(InputError, match=r"size was 3, is 4"), LatentWriter(tmp_path, {"size": 4}, pending=("vae",)):
        pass
    with LatentWriter(tmp_path, {"size": 3}, pending=("vae",)) as writer:
        with pytest.raises(InputError, match=r"vae was abc, is def"):
            writer.complete({"vae": "def"})
        writer.complete({"vae": "abc"})
    with (
        pytest.raises(InputError, match="part was whole, is rank 0 of 2"),
        LatentWriter(tmp_path, {"size": 3, "vae": "abc"}, part="rank 0 of 2"),
    ):
        pass


def test_version_1_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    save_file({"latents.0": torch.ones(3, 2, 4, 4)}, tmp_path / "shard-00000.safetensors")
    save_file({"text": torch.ones(2, 2)}, tmp_path / "text" / f"{sha256(b'p').hexdigest()[:32]}.safetensors")
    sample = {"key": "0", "prompt": "p", "seed": 4, "shard": "shard-00000.safetensors"}
    index = {"format": "arl2 latents, version 1", "settings": SETTINGS, "samples": [sample]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    latents, text = LatentDataset([tmp_path])[0]
    assert latents.shape == (3, 2, 4, 4) and text.shape == (2, 2)
    content = json.dumps([SETTINGS, [["0", "p", 4]]], sort_keys=True)
    expected = sha256(content.encode()).hexdigest()[:16]
    assert LatentDataset([tmp_path]).fingerprint() == expected, "runs that were begun on it go on"
    with pytest.raises(InputError, match=r"earlier version.* choose another folder"):
        fill(tmp_path, ["1"])


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"samples": {}},
        {"samples": ["x"]},
        {"samples": [{"key": "0"}]},
        {"samples": [{"key": 0, "prompt": "p", "seed": 0, "shard": "s"}]},
        {"samples": [{"key": "0", "prompt": "p", "seed": 0, "shard": "s", "new": 1}]},
        {"samples": [{"key": "0", "prompt": "p", "seed": 0, "shard": "s"}] * 2},
    ],
    ids=str,
)
def test_a_malformed_index_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    fill(tmp_path, ["0"])
    (tmp_path / INDEX).write_text(json.dumps(json.loads((tmp_path / INDEX).read_text()) | damage))
    for use in (lambda: LatentDataset([tmp_path]), lambda: fill(tmp_path, ["1"])):
        with pytest.raises(InputError, match="is damaged"):
            use()


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    for name, keys in (("a", ["0", "1"]), ("b", ["0", "1"]), ("c", ["0", "2"])):
        fill(tmp_path / name, keys)
    a, b, c = (LatentDataset([tmp_path / name]).fingerprint() for name in "abc")
    assert a == b != c
    assert len(LatentDataset([tmp_path / "a", tmp_path / "c"])) == 4


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training data"):
        LatentDataset([tmp_path])
    fill(tmp_path, ["0", "1"])
    with pytest.raises(InputError, match=r"name was x, is nothing; steps was \[1000, 500\], is \[1\]"):
        LatentWriter(tmp_path, {"steps": [1]}).__enter__()
    with LatentWriter(tmp_path, SETTINGS) as writer:
        with pytest.raises(InputError, match="already"):
            writer.add("0", torch.zeros(1), "p", 0, torch.zeros(1))
        with pytest.raises(InputError, match="sample '9' is not finite"):
            writer.add("9", torch.full((1,), torch.nan), "p", 0, torch.zeros(1))
        with pytest.raises(InputError, match="text of sample '9' is not finite"):
            writer.add("9", torch.zeros(1), "p", 0, torch.full((1,), torch.inf))
    data, shard = LatentDataset([tmp_path]), next(tmp_path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        data[0]
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        LatentDataset([tmp_path])
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(InputError, match="no index of latents"):
        LatentDataset([tmp_path])


Script = Callable[..., int]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4}).save_pretrained(folder)
    return folder


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Script:
    """Calls the script on two prompts."""
    sizes = "height: 32\nwidth: 48\nnum_output_frames: 3\ndenoising_steps: [1000]\n"
    (tmp_path / "config.yaml").write_text(f"model_folder: {model_folder}\n{sizes}")
    (tmp_path / "prompts.txt").write_text("a red shape\nblue\n")
    monkeypatch.chdir(tmp_path)

    def call(*flags: object) -> int:
        fixed = ["--config", "config.yaml", "--data_path", "prompts.txt", "--folder", "data", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate_latents.py", *fixed, *map(str, flags)])
        return int(generate_latents.main())

    return call


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(MemoryKind.window, 3, 0)], ids=["full", "window"])
def test_the_script_makes_what_inference_would_make(
    memory: MemoryConfig, generate: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path
) -> None:
    config = (tmp_path / "config.yaml").read_text().replace("frames: 3", "frames: 6").replace("[1000]", "[1000, 500]")
    with (tmp_path / "config.yaml").open("w") as file:
        window = f"window_frames: {memory.window_frames}, sink_frames: {memory.sink_frames}"
        file.write(f"{config}memory: {{kind: {memory.kind}, {window}}}\n")
    whole, calls = generate_latents.rollout, []

    def broken_once(*arguments: Any, **options: Any) -> Iterator[GeneratedBlock]:
        calls.append(arguments)
        for block in whole(*arguments, **options):
            yield replace(block, latents_BFCHW=block.latents_BFCHW * (math.nan if len(calls) == 1 else 1))

    monkeypatch.setattr(generate_latents, "rollout", broken_once)
    assert generate() == 1 and len(LatentDataset([tmp_path / "data"])) == 1, "the other sample is kept"
    assert generate() == 0 and generate() == 0 and len(calls) == 3
    data = LatentDataset([tmp_path / "data"])
    assert len(data) == 2 and data.settings["num_output_frames"] == 6
    sample = json.loads((tmp_path / "data" / INDEX).read_text())["samples"][0]
    pipeline = CausalVideoPipeline.from_pretrained(model_folder)
    pipeline.register_to_config(denoising_steps=[1000, 500])
    stream = pipeline.stream(sample["prompt"], 21, 32, 48, seeds=[sample["seed"]], memory=memory)
    expected = torch.cat([block.latents_BFCHW for block in stream], dim=1)[0]
    torch.testing.assert_close(data[0][0], expected.bfloat16(), rtol=2e-2, atol=2e-2)


def test_runs_into_one_folder_add_up_and_prune_takes_back(
    generate: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for flags, counts, samples, others in (
        ((), "0 kept, 2 new, 0 replaced, 0 removed", 2, 0),
        (("--seed", 1), "2 kept, 2 new, 0 replaced, 0 removed", 4, 2),
        (("--videos_per_prompt", 2), "4 kept, 2 new, 0 replaced, 0 removed", 6, 2),
        ((), "6 kept, 0 new, 0 replaced, 0 removed", 6, 4),
        (("--prune",), "2 kept, 0 new, 0 replaced, 4 removed", 2, 0),
    ):
        caplog.clear()
        assert generate(*flags) == 0
        assert counts in caplog.text, caplog.text
        assert (f"{others} samples of other prompts or seeds stay" in caplog.text) == bool(others)
        assert len(LatentDataset([tmp_path / "data"])) == samples
    (tmp_path / "prompts.txt").write_text("blue\ngreen\n")
    assert generate("--prune") == 0
    index = json.loads((tmp_path / "data" / INDEX).read_text())
    assert [sample["prompt"] for sample in index["samples"]] == ["blue", "green"]


def test_another_teacher_or_text_encoder_is_refused_and_another_path_is_not(
    generate: Script, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate() == 0
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace(str(model_folder), str(copy)))
    assert generate() == 0
    for part, name in (("text_encoder/model.safetensors", "text_encoder"), ("transformer", "weights")):
        file = copy / part if (copy / part).is_file() else next((copy / part).glob("*.safetensors"))
        state, before = load_file(file), file.read_bytes()
        save_file({key: value * 1.5 for key, value in state.items()}, file, metadata={"format": "pt"})
        assert generate() == 2
        assert f"({name} was" in " ".join(capsys.readouterr().err.split())
        file.write_bytes(before)
    assert generate() == 0
    assert generate("--dtype", "bfloat16") == 2
    assert "dtype was torch.float32, is torch.bfloat16" in " ".join(capsys.readouterr().err.split())
    assert generate("--videos_per_prompt", 0) == 2


def test_ranks_keep_their_number(
    generate: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    for world_size, status in ((2, 0), (3, 2)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert generate() == status
    assert "by another number of processes, now 3: start as many" in " ".join(capsys.readouterr().err.split())
    assert len(LatentDataset([tmp_path / "data" / "rank-0"])) == 1
    with pytest.raises(InputError, match=r"no training data in .*/data: give its parts, data=\[.*/data/rank-0\]"):
        LatentDataset([tmp_path / "data"])


@pytest.mark.parametrize(("before", "rank", "now"), [(2, 0, 1), (1, 0, 2), (3, 2, 2), (2, 0, 3)])
def test_another_number_of_processes_is_refused(
    before: int,
    rank: int,
    now: int,
    generate: Script,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They would make all of it again, beside what there is."""
    (tmp_path / "prompts.txt").write_text("a red shape\nblue\ngreen\n")
    for world, place, status in ((before, rank, 0), (now, now - 1, 2)):
        monkeypatch.setenv("RANK", str(place))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert generate() == status
    assert f"by another number of processes, now {now}: start as many" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("target", ["file", "limit"])
def test_where_nothing_can_be_written_no_model_is_loaded(
    target: str, generate: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate_latents, "Teacher", lambda *arguments: pytest.fail("a model was loaded"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if target == "file":
        (tmp_path / "data").write_text("in the way")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    try:
        status = generate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2 and capsys.readouterr().err.startswith("error: cannot write to data")


def test_a_disk_that_fills_up_is_an_error_and_nothing_half_is_left(
    generate: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate() == 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limit[1]))
    try:
        status = generate("--seed", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: cannot write data/") and error.count("\n") == 1
    assert len(LatentDataset([tmp_path / "data"])) == 2 and not list((tmp_path / "data").glob(".*"))
