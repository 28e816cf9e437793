"""Training data checked whole before the first step, and runs that come to nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HEIGHT, TINY, WIDTH
from torch import Tensor
from training_world import build_world, losses, one_line, train

from arl2.distillation.data import LatentDataset, ResidentLatents, values_hash
from arl2.distillation.latent_writer import INDEX, LatentWriter, SampleInfo
from arl2.distillation.stage1 import Stage1
from arl2.distillation.trainer import Trainer
from wan.utils.errors import InputError

Index = dict[str, Any]
SHARD = "shard-00000.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """A copy of the world's five samples without hashes, as earlier versions wrote it, to be damaged."""
    folder = Path(shutil.copytree(world / "data", tmp_path / "data"))
    change_index(folder, without_hashes)
    return folder


def without_hashes(index: Index) -> None:
    for sample in index["samples"]:
        del sample["latents_hash"], sample["text_hash"]


def change_index(folder: Path, change: Callable[[Index], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def change_shard(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    latents = load_file(folder / SHARD)
    change(latents)
    save_file(latents, folder / SHARD)


def change_text(folder: Path, sample: int, text: dict[str, Tensor]) -> None:
    name = json.loads((folder / INDEX).read_text())["samples"][sample]["text"]
    save_file(text, folder / "text" / name)


def set_field(sample: int, name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: change_index(folder, lambda index: index["samples"][sample].update({name: value}))


def set_latents(sample: int, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_shard(folder, lambda latents: latents.update({f"latents.{sample}": value}))


def set_text(value: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_text(folder, 3, {"text": value})


def index_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_bytes(text) and None


SHAPE = (9, TINY["in_dim"], HEIGHT, WIDTH)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "shorter": (set_latents(3, torch.zeros(6, *SHAPE[1:])), "sample '3'"),
    "first is other": (set_latents(0, torch.zeros(6, *SHAPE[1:])), "sample '0'"),
    "wider": (set_latents(2, torch.zeros(*SHAPE[:3], WIDTH + 2)), "sample '2'"),
    "flat": (set_latents(4, torch.zeros(9, 96)), "sample '4'"),
    "empty": (set_latents(4, torch.zeros(0, *SHAPE[1:])), "sample '4'"),
    "complex": (set_latents(1, torch.zeros(SHAPE, dtype=torch.complex64)), "type C64"),
    "integers": (set_latents(1, torch.zeros(SHAPE, dtype=torch.int8)), "type I8"),
    "float8": (set_latents(1, torch.zeros(SHAPE).to(torch.float8_e4m3fn)), "F8_E4M3"),
    "key gone": (lambda d: change_shard(d, lambda latents: latents.pop("latents.2")), "sample '2'"),
    "no such shard": (set_field(2, "shard", "shard-00009.safetensors"), "sample '2'"),
    "shard outside": (set_field(2, "shard", "../data/shard-00000.safetensors"), "no name of a file"),
    "shard absolute": (set_field(2, "shard", "/etc/passwd"), "no name of a file"),
    "shard is parent": (set_field(2, "shard", ".."), "no name of a file"),
    "shard empty": (set_field(2, "shard", ""), "no name of a file"),
    "shard with NUL": (set_field(2, "shard", "a\0b"), "no name of a file"),
    "text outside": (set_field(2, "text", "../index.json"), "no name of a file"),
    "shard is a folder": (lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), "sample '0'"),
    "shard cut": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), "sample '0'"),
    "shard empty file": (lambda d: (d / SHARD).write_bytes(b""), "sample '0'"),
    "text width": (set_text(torch.zeros(4, 7)), "sample '3'"),
    "text flat": (set_text(torch.zeros(12)), "sample '3'"),
    "text empty": (set_text(torch.zeros(0, 12)), "sample '3'"),
    "text type": (set_text(torch.zeros(4, 12, dtype=torch.int32)), "sample '3'"),
    "text unnamed": (lambda d: change_text(d, 3, {"x": torch.zeros(4, 12)}), "sample '3'"),
    "no settings": (lambda d: change_index(d, lambda index: index.pop("settings")), "settings"),
    "settings a list": (lambda d: change_index(d, lambda index: index.update(settings=[1])), "settings"),
    "no samples": (lambda d: change_index(d, lambda index: index.pop("samples")), "samples"),
    "samples null": (lambda d: change_index(d, lambda index: index.update(samples=None)), "samples"),
    "samples empty": (lambda d: change_index(d, lambda index: index.update(samples=[])), "no samples"),
    "sample a text": (lambda d: change_index(d, lambda index: index["samples"].append("x")), "sample 5"),
    "key a number": (set_field(2, "key", 2), "sample 2"),
    "prompt null": (set_field(2, "prompt", None), "sample 2"),
    "seed a truth": (set_field(2, "seed", True), "sample 2"),
    "seed a fraction": (set_field(2, "seed", 1.5), "sample 2"),
    "unknown field": (set_field(2, "surprise", 1), "sample 2"),
    "field gone": (lambda d: change_index(d, lambda index: index["samples"][2].pop("seed")), "sample 2"),
    "key twice": (set_field(2, "key", "1"), "twice"),
    "name twice": (index_text(b'{"format": "x", "format": "y"}'), "is given twice"),
    "bad UTF-8": (index_text(b'{"format": "\xff\xfe"}'), "not valid JSON"),
    "half": (lambda d: (d / INDEX).write_bytes((d / INDEX).read_bytes()[:300]), "not valid JSON"),
    "a list": (index_text(b"[]"), "list"),
    "deep": (index_text(b"[" * 100_000), "not valid JSON"),
    "a folder": (lambda d: ((d / INDEX).unlink(), (d / INDEX).mkdir()), "cannot read"),
    "odd prompt": (lambda d: set_field(2, "prompt", "\ud800")(d) or set_field(2, "text", "")(d), "sample '2'"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_data_is_refused_when_it_is_opened(data: Path, name: str) -> None:
    damage, message = BAD[name]
    damage(data)
    with pytest.raises(InputError) as caught:
        LatentDataset([data])
    text = str(caught.value)
    assert message in text and "\n" not in text and str(data) in text, text


def test_data_that_does_not_fit_the_model_or_has_nothing_to_learn_is_refused_before_models_load(
    world: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("pipelines.training.run.read_transformer", load)
    change_text(data, 3, {"text": torch.zeros(6, TINY["text_dim"])})
    assert train(monkeypatch, world, 1, f"data=[{data}]") == 2
    assert "longest text is that of sample '3'" in one_line(capsys)
    for stage in (1, 2):
        for setting in ("path=loop", "path=parallel"):
            few = ("frames_per_block=9", "levels.per_block=1", setting)
            assert train(monkeypatch, world, stage, *few) == 2
            assert "nothing to learn" in one_line(capsys)
    assert train(monkeypatch, world, 1, "frames_per_block=9", "loss_on_clean_pass=false") == 2
    assert "at least two blocks" in one_line(capsys)


@pytest.mark.parametrize(("stage", "setting"), [(1, "loss_on_clean_pass=true"), (1, "path=parallel"), (2, "lora=true")])
def test_a_single_block_has_no_gradient_which_ends_a_run(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    setting: str,
) -> None:
    """The reason for the check, and what happens where it cannot tell."""
    monkeypatch.setattr("pipelines.training.config.check_data", lambda *arguments: None)
    more = ("levels.per_block=1", "optimizer.decay=constant", f"run_folder={tmp_path / 'run'}", setting)
    status = train(monkeypatch, world, stage, "frames_per_block=9", "max_bad_steps=4", *more)
    assert status == 1 and "gradient was exactly zero in all 4 steps" in one_line(capsys)
    assert {line["grad_norm"] for line in losses(tmp_path / "run")} == {0.0} and not (tmp_path / "run/export").exists()


def test_two_blocks_are_enough_also_with_graphs_of_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LatentWriter(tmp_path / "data", {}) as writer:
        writer.add("0", torch.randn(6, *SHAPE[1:]), "p", 0, torch.randn(4, TINY["text_dim"]))
    for stage in (1, 2):
        folder = tmp_path / f"run{stage}"
        more = (f"data=[{tmp_path / 'data'}]", f"run_folder={folder}", "steps=1", "blocks_per_graph=1")
        assert train(monkeypatch, world, stage, *more) == 0
        assert losses(folder)[0]["grad_norm"] > 0


@pytest.mark.parametrize("what", ["latents", "text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_a_run_and_name_the_sample(
    world: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    value: float,
) -> None:
    latents, text = torch.zeros(SHAPE), torch.zeros(4, TINY["text_dim"])
    (latents if what == "latents" else text).view(-1)[-1] = value
    set_latents(3, latents)(data)
    set_text(text)(data)
    run = data.parent / "run"
    assert train(monkeypatch, world, 1, f"data=[{data}]", f"run_folder={run}") == 2
    message = one_line(capsys)
    assert f"sample '3' of {data}: not all values of its {what} are finite" in message
    assert len(losses(run)) < 3 and not (run / "export").exists()


def test_a_sample_too_large_for_float32_is_not_finite(data: Path) -> None:
    set_latents(3, torch.full(SHAPE, 1e300, dtype=torch.float64))(data)
    with pytest.raises(InputError, match="sample '3'"):
        LatentDataset([data])[3]


def test_texts_of_different_types_come_alike_whatever_the_batch(data: Path) -> None:
    set_text(torch.randn(2, TINY["text_dim"]).bfloat16())(data)
    samples = LatentDataset([data])
    assert torch.equal(samples.gather([3, 1])[1][1], samples.gather([1])[1][0])
    assert samples.latents_shape == SHAPE and samples.text_shape == (4, TINY["text_dim"])


def test_folders_of_another_kind_are_named_with_the_difference(world: Path, tmp_path: Path) -> None:
    with LatentWriter(tmp_path, {"made": "otherwise"}) as writer:
        writer.add("0", torch.zeros(SHAPE), "p", 0, torch.zeros(4, TINY["text_dim"]))
    with pytest.raises(InputError, match="made was otherwise, is for tests"):
        LatentDataset([world / "data", tmp_path])
    with pytest.raises(InputError, match="names no folder"):
        LatentDataset([])


def test_data_under_another_path_does_not_count_double(
    data: Path, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=f"are in both .* and {data}, and would count double: name one"):
        LatentDataset([world / "data", data])
    change_index(data, lambda index: index["samples"].reverse())
    change_index(data, lambda index: index["samples"].pop())
    with pytest.raises(InputError, match="would count double"):
        LatentDataset([data, world / "data"])
    for samples, said in ((3, "1 samples are in both"), (4, "")):
        caplog.clear()
        other = {f"latents.{number}": torch.randn(SHAPE) for number in range(5 - samples, 5)}
        change_shard(data, lambda latents, other=other: latents.update(other))  # type: ignore[misc]
        assert len(LatentDataset([data, world / "data"])) == 9, "other values are other samples"
        assert said in caplog.text and bool(said) == bool(caplog.text)


def plus_one(folder: Path, what: str) -> None:
    if what == "latents":
        change_shard(folder, lambda latents: latents["latents.3"].view(-1)[-1:].add_(1))
    else:
        name = json.loads((folder / INDEX).read_text())["samples"][3]["text"]
        change_text(folder, 3, {"text": load_file(folder / "text" / name)["text"] + 1})


@pytest.mark.parametrize("what", ["latents", "text"])
def test_a_sample_that_is_not_what_was_written_is_named(
    what: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(world / "data", tmp_path / "data"))
    plus_one(folder, what)
    message = f"sample '3' of {folder}: the values of its {what} are not what was written"
    data = LatentDataset([folder])
    with pytest.raises(InputError, match=message):
        data.gather([0, 3])
    with pytest.raises(InputError, match=message):
        data.values_fingerprint()
    monkeypatch.setattr("arl2.distillation.data.MAX_HASHED_BYTES", 1)
    monkeypatch.setattr("arl2.distillation.data.PIECE_BYTES", 8)
    LatentDataset([folder]).values_fingerprint()  # pieces say nothing: it is found when it is read
    monkeypatch.undo()
    assert train(monkeypatch, world, 1, f"data=[{folder}]", f"run_folder={tmp_path / 'run'}") == 2
    assert message in one_line(capsys)
    change_index(folder, without_hashes)
    assert len(LatentDataset([folder]).gather([0, 3])) == 2


def remake(folder: Path) -> list[str]:
    """Go on with the world's data as a script does; returns the samples that were made again."""
    page = json.loads((folder / INDEX).read_text())
    wanted = [SampleInfo(one["key"], one["prompt"], one["seed"]) for one in page["samples"]]
    with LatentWriter(folder, page["settings"]) as writer:
        writer.complete({}, SHAPE, (4, TINY["text_dim"]))
        missing = writer.missing(wanted, prune=True)
        for sample in missing:
            latents = None if writer.has_latents(sample) else torch.zeros(SHAPE)
            writer.add(sample.key, latents, sample.prompt, sample.seed, torch.zeros(4, TINY["text_dim"]))
    return [sample.key for sample in missing]


SPOILED: dict[str, Callable[[Path], object]] = {
    "nan": set_latents(3, torch.full(SHAPE, float("nan"))),
    "short": set_latents(3, torch.zeros(6, *SHAPE[1:])),
    "flat": set_latents(3, torch.zeros(9, 96)),
    "integers": set_latents(3, torch.zeros(SHAPE, dtype=torch.int8)),
    "complex": set_latents(3, torch.zeros(SHAPE, dtype=torch.complex64)),
    "text nan": set_text(torch.full((4, TINY["text_dim"]), float("nan"))),
    "text narrow": set_text(torch.zeros(4, 1)),
    "text long": set_text(torch.zeros(5, TINY["text_dim"])),
    "text empty": set_text(torch.zeros(0, TINY["text_dim"])),
    "text integers": set_text(torch.zeros(4, TINY["text_dim"], dtype=torch.int8)),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_samples_are_made_again(data: Path, name: str) -> None:
    SPOILED[name](data)
    assert remake(data) == ["3"]
    files = {file: file.read_bytes() for file in data.rglob("*.safetensors")}
    assert remake(data) == [] and {file: file.read_bytes() for file in data.rglob("*.safetensors")} == files
    found = LatentDataset([data])
    assert len(found) == 5 and found.gather(range(5))[0].isfinite().all()
    stored = [name for file in data.glob("shard-*") for name in load_file(file)]
    assert sorted(stored) == [f"latents.{number}" for number in range(5)], "what was damaged is gone"


@pytest.mark.parametrize("what", ["latents", "text"])
def test_samples_of_other_values_are_made_again(what: str, world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "data", tmp_path / "data"))
    assert remake(folder) == []
    plus_one(folder, what)
    assert remake(folder) == ["3"] and remake(folder) == []
    LatentDataset([folder]).values_fingerprint()


def test_the_identity_of_data_is_its_content_wherever_it_lies(data: Path, world: Path, tmp_path: Path) -> None:
    before, values = LatentDataset([world / "data"]).fingerprint(), LatentDataset([world / "data"]).values_fingerprint()
    assert LatentDataset([data]).fingerprint() == before and LatentDataset([data]).values_fingerprint() == values
    samples = LatentDataset([data])
    with LatentWriter(tmp_path / "other", samples.settings, samples_per_shard=2) as writer:
        for number in range(5):
            writer.add(str(number), samples[number][0], f"prompt {number}", number, samples[number][1])
    divided = LatentDataset([tmp_path / "other"])
    assert divided.fingerprint() == before and divided.values_fingerprint() == values, "in other shards"
    change_shard(data, lambda latents: latents["latents.3"].view(-1)[-1].add_(1))
    changed = LatentDataset([data]).values_fingerprint()
    change_text(data, 3, {"text": torch.zeros(4, TINY["text_dim"])})
    assert len({values, changed, LatentDataset([data]).values_fingerprint()}) == 3


def test_large_tensors_are_hashed_in_pieces_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arl2.distillation.data.PIECE_BYTES", 100)
    file, content = tmp_path / "x.safetensors", torch.randint(256, (5000,), dtype=torch.uint8)

    def hash_of(content: Tensor, most: int = 1000) -> str:
        save_file({"before": torch.zeros(7), "x": content, "z": torch.zeros(3)}, file)
        return values_hash((file, "x"), most)

    hashes = {
        hash_of(content),
        hash_of(content[:4999]),
        hash_of(content.view(50, 100)),
        hash_of(content.view(torch.int8)),
    }
    for place in (0, 2200, 4999):
        changed = content.clone()
        changed[place] ^= 1
        hashes |= {hash_of(changed)}
    assert len(hashes) == 7
    changed = content.clone()
    changed[150] ^= 1
    assert hash_of(changed) == hash_of(content), "between two pieces"
    assert hash_of(changed, 5000) != hash_of(content, 5000), "small ones are hashed whole"


def test_resident_data_is_checked_whole(tmp_path: Path) -> None:
    file, device = tmp_path / "x.safetensors", torch.device("cpu")
    good = {"latents": torch.randn(70, 6, 4, 2, 2), "text": torch.randn(70, 3, 8)}

    def opened(**changes: Tensor) -> ResidentLatents:
        save_file(good | changes, file)
        return ResidentLatents(file, device)

    assert opened().latents_shape == (6, 4, 2, 2) and opened().text_shape == (3, 8)
    before, other = opened().values_fingerprint(), good["latents"].clone()
    other[69, -1, -1, -1, -1] += 1
    assert opened(latents=other).values_fingerprint() != before
    other[69, -1, -1, -1, -1] = float("nan")
    with pytest.raises(InputError, match="latents of sample 69 are finite"):
        opened(latents=other)
    for changes, message in (
        ({"text": torch.full((70, 3, 8), float("inf"))}, "text of sample 0"),
        ({"latents": torch.zeros(70, 6, 4, 2, 2, dtype=torch.int16)}, "type I16"),
        ({"latents": torch.zeros(0, 6, 4, 2, 2)}, "shape"),
    ):
        with pytest.raises(InputError, match=message):
            opened(**changes)
    file.write_bytes(file.read_bytes()[:-1])
    for path in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="again"):
            ResidentLatents(path, device)


def nan_in(steps: set[int]) -> Callable[..., Iterator[Tensor]]:
    """Stage 1 with a loss that is not finite in some steps."""
    honest, calls = Stage1.losses, iter(range(1, 100))

    def losses_of(self: Stage1, *arguments: Any) -> Iterator[Tensor]:
        broken = next(calls) in steps
        for part in honest(self, *arguments):
            yield part * float("nan") if broken else part

    return losses_of


def test_a_run_that_skipped_more_than_it_learned_is_no_success(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stage1, "losses", nan_in({1, 2, 4, 6}))
    more = (f"run_folder={tmp_path / 'run'}", "report_every=100")
    for _ in range(2):  # started again, it still is none
        assert train(monkeypatch, world, 1, *more) == 1
        assert "4 of 6 steps were skipped" in one_line(capsys) and not (tmp_path / "run" / "export").exists()
    monkeypatch.setattr(Stage1, "losses", nan_in({1, 2, 4}))
    assert train(monkeypatch, world, 1, f"run_folder={tmp_path / 'other'}", "report_every=100") == 0, "half of them"


def test_it_ends_early_when_there_is_no_hope(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stage1, "losses", nan_in({1, 2, 4, 6, 7}))
    more = (f"run_folder={tmp_path / 'run'}", "report_every=100", "steps=40", "max_bad_steps=5", "save_every=40")
    assert train(monkeypatch, world, 1, *more) == 1
    assert "3 of 5 steps were skipped" in one_line(capsys)


def test_a_run_that_changes_nothing_is_no_success(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, world, 1, f"run_folder={tmp_path / 'run'}", "optimizer.lr=1e-60") == 1
    assert "no parameter changed" in one_line(capsys) and not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("average", [False, True])
def test_what_is_not_finite_is_neither_kept_nor_exported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], average: bool
) -> None:
    run, honest = tmp_path / "run", Trainer._average

    def spoil(self: Trainer) -> None:
        honest(self)
        state = self.state
        if state.progress.step == 3:
            values = state.ema if average else state.trainables
            assert values is not None
            values["blocks.1.self_attn.A_log"].data[0] = float("nan")

    monkeypatch.setattr(Trainer, "_average", spoil)
    assert train(monkeypatch, world, 1, f"run_folder={run}") == 2
    assert "blocks.1.self_attn.A_log is not finite after step 4" in one_line(capsys)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_teacher_that_is_not_finite_is_refused_before_it_teaches(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    file = model / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["head.head.bias"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    run = tmp_path / "run"
    status = train(monkeypatch, world, 1, f"run_folder={run}", f"model_folder={model}")
    assert status == 2 and "head.head.bias has 1 of 16 values NaN" in one_line(capsys)
    assert not (run / "export").exists() and not (run / "losses.jsonl").exists()
