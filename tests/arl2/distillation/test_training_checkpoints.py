"""Checkpoints of a run: damaged ones are named with their file, and nothing is gone on with in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_world import build_world, losses, one_line, train, weights

from arl2.distillation.checkpointing import (
    Progress,
    TrainingState,
    complete_checkpoints,
    load_state,
    newest_checkpoint,
    stored_fingerprint,
    truncate_losses,
)
from pipelines.training import run as training_run
from pipelines.training.config import Stage1Config
from pipelines.training.run import build_model, new_objective
from wan.utils.errors import CheckpointError, InputError

Page = dict[str, Any]
NEWEST, OLDER = "checkpoints/step-00000004", "checkpoints/step-00000002"
NAME = "blocks.1.self_attn.A_log"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose run was trained for four steps, with a constant learning rate."""
    root = build_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert train(monkeypatch, root, 1, "steps=4", "optimizer.decay=constant", "sample_every=0") == 0
    return root


def change_state(change: Callable[[Page], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        page = json.loads((checkpoint / "state.json").read_text())
        change(page)
        (checkpoint / "state.json").write_text(json.dumps(page))

    return damage


def progress(**counters: object) -> Callable[[Path], None]:
    return change_state(lambda page: page["progress"].update(counters))


def change_file(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        state = load_file(checkpoint / file)
        change(state)
        save_file({name: value.contiguous() for name, value in state.items()}, checkpoint / file)

    return damage


def spoiled(file: str, name: str, value: float) -> Callable[[Path], None]:
    return change_file(file, lambda state: state[name].view(-1)[:1].fill_(value))


def cut(file: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:-5]) and None


def a_folder(file: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / file).unlink()
        (checkpoint / file).mkdir()

    return damage


def every_file(name: str, damage: Callable[[str], Callable[[Path], None]]) -> dict[str, tuple[str, Any]]:
    tensors = ("trainables", "ema", "optimizer")
    files = ("state.json", *(f"{one}.safetensors" for one in tensors))
    return {f"{name} {file}": (file, damage(file)) for file in files}


TENSORS, OPTIMIZER, EMA, STATE = "trainables.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
FLAT = torch.zeros(1)
BAD: dict[str, tuple[str, Callable[[Path], None]]] = {
    "step negative": (STATE, progress(step=-5)),
    "step huge": (STATE, progress(step=10**9)),
    "step another": (STATE, progress(step=3)),
    "step a text": (STATE, progress(step="4")),
    "step a truth": (STATE, progress(step=True)),
    "step a fraction": (STATE, progress(step=4.0)),
    "step null": (STATE, progress(step=None)),
    "skipped NaN": (STATE, progress(skipped=float("nan"))),
    "skipped negative": (STATE, progress(skipped=-1)),
    "skipped more than done": (STATE, progress(skipped=5)),
    "in a row more than skipped": (STATE, progress(skipped_in_row=1)),
    "skipped, though the optimiser did not": (OPTIMIZER, progress(skipped=1)),
    "unknown counter": (STATE, progress(surprise=1)),
    "counter gone": (STATE, change_state(lambda page: page["progress"].pop("skipped"))),
    "progress gone": (STATE, change_state(lambda page: page.pop("progress"))),
    "progress a list": (STATE, change_state(lambda page: page.update(progress=[4, 0, 0]))),
    "fingerprint gone": (STATE, change_state(lambda page: page.pop("fingerprint"))),
    "fingerprint a text": (STATE, change_state(lambda page: page.update(fingerprint="x"))),
    "unknown entry": (STATE, change_state(lambda page: page.update(surprise=1))),
    "bad UTF-8": (STATE, lambda path: (path / STATE).write_bytes(b'{"a": "\xff"}') and None),
    "deep": (STATE, lambda path: (path / STATE).write_text("[" * 100_000) and None),
    "optimiser knows another": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.update({"x.exp_avg": FLAT}))),
    "optimiser lacks one": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.pop(f"{NAME}.exp_avg"))),
    "optimiser keeps more": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.update({f"{NAME}.max": FLAT}))),
    "optimiser misshapen": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.update({f"{NAME}.exp_avg": FLAT}))),
    "optimiser in half": (
        OPTIMIZER,
        change_file(OPTIMIZER, lambda state: state.update({f"{NAME}.exp_avg": state[f"{NAME}.exp_avg"].half()})),
    ),
    "optimiser without names": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.update({"": FLAT}))),
    "optimiser empty": (OPTIMIZER, change_file(OPTIMIZER, lambda state: state.clear())),
    "moment NaN": (OPTIMIZER, spoiled(OPTIMIZER, f"{NAME}.exp_avg", float("nan"))),
    "moment negative": (OPTIMIZER, spoiled(OPTIMIZER, f"{NAME}.exp_avg_sq", -1.0)),
    "optimiser's step": (OPTIMIZER, spoiled(OPTIMIZER, f"{NAME}.step", 1e9)),
    "parameter NaN": (TENSORS, spoiled(TENSORS, NAME, float("nan"))),
    "parameter infinite": (TENSORS, spoiled(TENSORS, NAME, float("inf"))),
    "parameter gone": (TENSORS, change_file(TENSORS, lambda state: state.pop(NAME))),
    "parameter too many": (TENSORS, change_file(TENSORS, lambda state: state.update(surprise=FLAT))),
    "parameter misshapen": (TENSORS, change_file(TENSORS, lambda state: state.update({NAME: FLAT}))),
    "parameter complex": (
        TENSORS,
        change_file(TENSORS, lambda state: state.update({NAME: state[NAME].to(torch.complex64)})),
    ),
    "average NaN": (EMA, spoiled(EMA, NAME, float("nan"))),
    "average lacks one": (EMA, change_file(EMA, lambda state: state.pop(NAME))),
    **every_file("cut", cut),
    **every_file("a folder for", a_folder),
    **every_file("gone", lambda file: lambda checkpoint: (checkpoint / file).unlink()),
    **every_file("empty", lambda file: lambda checkpoint: (checkpoint / file).write_bytes(b"") and None),
}


def copied_run(world: Path, target: Path) -> Path:
    return Path(shutil.copytree(world / "run", target / "run"))


def go_on(monkeypatch: pytest.MonkeyPatch, world: Path, run: Path, *settings: str) -> int:
    return train(monkeypatch, world, 1, "optimizer.decay=constant", f"run_folder={run}", *settings)


@pytest.fixture(scope="module")
def state(world: Path) -> TrainingState:
    """What checkpoints of the world's run are loaded into."""
    config = Stage1Config(model_folder=str(world / "model"))
    trainables = new_objective(config, build_model(config, torch.device("cpu"))[0]).parameters_to_train()
    average = {name: value.detach().clone() for name, value in trainables.items()}
    return TrainingState(trainables, torch.optim.AdamW(trainables.values()), average, Progress())


def load_newest(state: TrainingState, folder: Path) -> None:
    newest, fingerprint = newest_checkpoint(folder), stored_fingerprint(folder)
    assert newest is not None and fingerprint is not None
    load_state(state, newest, fingerprint)


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_checkpoint_is_named_and_nothing_goes_back_in_silence(
    world: Path, tmp_path: Path, state: TrainingState, name: str
) -> None:
    run, (file, damage) = copied_run(world, tmp_path), BAD[name]
    load_newest(state, run / "checkpoints")
    assert state.progress.step == 4
    before = {name: value.detach().clone() for name, value in state.trainables.items()}
    damage(run / NEWEST)
    with pytest.raises(CheckpointError) as caught:
        load_newest(state, run / "checkpoints")
    message = str(caught.value)
    assert f"{run / NEWEST / file} is damaged" in message and "\n" not in message, message
    assert message.endswith(f"delete {run / NEWEST} to go on from step 2"), message
    assert all(torch.equal(value, before[name]) for name, value in state.trainables.items()), "nothing by halves"


def test_the_cure_of_a_damaged_checkpoint_works(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = copied_run(world, tmp_path), tmp_path / "whole"
    cut("trainables.safetensors")(run / NEWEST)
    cut("state.json")(run / OLDER)
    assert go_on(monkeypatch, world, run) == 2
    one_line(capsys)
    shutil.rmtree(run / NEWEST)
    assert go_on(monkeypatch, world, run) == 2
    assert "start from the first step" in one_line(capsys)
    shutil.rmtree(run / OLDER)
    assert go_on(monkeypatch, world, run) == 0 and go_on(monkeypatch, world, whole) == 0
    assert weights(run, 6) == weights(whole, 6) and losses(run) == losses(whole)


def test_a_run_that_cannot_go_on_keeps_its_page(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (file, damage) in enumerate((("trainables", cut), ("optimizer", cut), ("losses.jsonl", None))):
        run = copied_run(world, tmp_path / str(number))
        if damage is None:
            (run / file).write_text("no JSON\n" * 2)
        else:
            damage(f"{file}.safetensors")(run / NEWEST)
        before = (run / "run.json").read_bytes()
        assert go_on(monkeypatch, world, run, "save_every=3") == 2 and "is damaged" in one_line(capsys)
        assert (run / "run.json").read_bytes() == before, file


def test_an_average_that_does_not_belong_there_is_damage(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert go_on(monkeypatch, world, run, "ema_decay=null", "steps=2") == 0
    shutil.copy(run / OLDER / "trainables.safetensors", run / OLDER / "ema.safetensors")
    assert go_on(monkeypatch, world, run, "ema_decay=null") == 2
    assert "ema.safetensors is damaged (it does not belong there)" in one_line(capsys)


def test_a_checkpoint_beyond_the_last_step_is_not_exported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied_run(world, tmp_path)
    assert go_on(monkeypatch, world, run, "steps=3") == 2
    assert "step-00000004 is beyond steps 3: give more steps" in one_line(capsys)


DAMAGED_LOSSES: dict[str, bytes | None] = {
    "no JSON": b'{"step": 1}\nx\n{"step": 3}\n{"step": 4}\n',
    "a gap": b'{"step": 1}\n{"step": 2}\n{"step": 4}\n',
    "twice": b'{"step": 3}\n{"step": 4}\n{"step": 4}\n',
    "too short": b'{"step": 1}\n{"step": 2}\n',
    "no step": b'{"stop": 4}\n',
    "a truth": b'{"step": true}\n',
    "a list": b"[4]\n",
    "bad UTF-8": b'{"step": 4, "x": "\xff\xfe"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a folder": None,
}


@pytest.mark.parametrize("name", DAMAGED_LOSSES)
def test_a_damaged_log_is_named_with_the_cure(tmp_path: Path, name: str) -> None:
    log, content = tmp_path / "losses.jsonl", DAMAGED_LOSSES[name]
    log.mkdir() if content is None else log.write_bytes(content)
    with pytest.raises(InputError) as caught:
        truncate_losses(log, 4)
    message = str(caught.value)
    assert message.startswith(f"{log} is damaged") and message.endswith("delete it to go on without the curve so far")
    assert content is None or log.read_bytes() == content


def test_a_run_goes_on_without_its_log(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied_run(world, tmp_path)
    (run / "losses.jsonl").write_text("x\n")
    assert go_on(monkeypatch, world, run) == 2 and "delete it to go on" in one_line(capsys)
    (run / "losses.jsonl").unlink()
    assert go_on(monkeypatch, world, run) == 0 and [line["step"] for line in losses(run)] == [5, 6]
    with (run / "losses.jsonl").open("a") as log:
        log.write('{"step": 7}\n{"ste')  # of a session that was killed
    assert go_on(monkeypatch, world, run, "steps=8") == 0 and [line["step"] for line in losses(run)] == [5, 6, 7, 8]


def test_files_in_the_place_of_folders_are_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("")
    assert go_on(monkeypatch, world, run) == 2 and "is a file" in one_line(capsys)
    (run / "checkpoints").unlink()
    (run / "run.json").mkdir()
    assert go_on(monkeypatch, world, run) == 2 and "cannot write" in one_line(capsys)


def test_what_stage_two_starts_from_is_checked_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = copied_run(world, tmp_path)
    folder = f"run_folder={tmp_path / 'two'}"
    name = "blocks.0.self_attn.A_log"
    for damage in (
        spoiled(TENSORS, name, float("nan")),
        change_file(TENSORS, lambda state: state.update({name: state[name].to(torch.int32)})),
    ):
        before = (start / NEWEST / TENSORS).read_bytes()
        damage(start / NEWEST)
        assert train(monkeypatch, world, 2, folder, f"init_from={start}") == 2
        assert f"{name} holds values that are no finite numbers" in one_line(capsys)
        (start / NEWEST / TENSORS).write_bytes(before)
    (start / NEWEST / TENSORS).unlink()
    assert train(monkeypatch, world, 2, folder, f"init_from={start}") == 2
    assert f"{start / NEWEST / TENSORS} is damaged" in one_line(capsys)


def test_files_to_go_on_from_are_checked_before_models_load(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied_run(world, tmp_path)
    monkeypatch.setattr(training_run, "build_model", lambda *_, **__: pytest.fail("a model was built"))
    for settings, message in (
        (("seed=5",), "(seed was 0, is 5)"),
        (("steps=3",), "is beyond steps 3"),
        (("layers=[0]",), "layers was"),
    ):
        assert go_on(monkeypatch, world, run, *settings) == 2 and message in one_line(capsys)
    (run / NEWEST / "state.json").write_text("{")
    assert go_on(monkeypatch, world, run) == 2 and "state.json is damaged" in one_line(capsys)
    (tmp_path / "a.txt").write_text("words")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    state = load_file(world / "run" / NEWEST / TENSORS)
    save_file({name: value[..., :1].contiguous() for name, value in state.items()}, tmp_path / "small.safetensors")
    for name, message in (
        ("none", "neither a stage-1 run nor its trainables"),
        ("a.txt", "is a text file"),
        ("other.safetensors", "lacks blocks.0.self_attn"),
        ("other.pt", "lacks blocks.0.self_attn"),
        ("small.safetensors", "does not fit the parameters to train"),
    ):
        two = (f"run_folder={tmp_path / 'two'}", f"init_from={tmp_path / name}")
        assert train(monkeypatch, world, 2, *two) == 2 and message in one_line(capsys)


@pytest.mark.parametrize(("decay", "cure"), [("constant", "steps=4"), ("cosine", "steps=4 run_folder=")])
def test_a_run_says_whether_it_goes_on_or_is_complete(
    decay: str,
    cure: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    settings = ("steps=2", f"optimizer.decay={decay}", "optimizer.warmup_steps=0")
    assert go_on(monkeypatch, world, tmp_path / "run", *settings) == 0
    assert "are new" in caplog.text and "is complete" not in caplog.text
    caplog.clear()
    assert go_on(monkeypatch, world, tmp_path / "run", *settings) == 0
    said = [record.getMessage() for record in caplog.records if "is complete at step 2" in record.getMessage()]
    assert len(said) == 1 and cure in said[0] and "are new" not in caplog.text and "goes on" not in caplog.text
    if decay == "constant":
        assert go_on(monkeypatch, world, tmp_path / "run", *settings, "steps=3") == 0
        assert f"the run in {tmp_path / 'run'} goes on after step 2 of 3" in caplog.text


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ["step-00000002", "step-99999999", "step-100000000"]
    for name in (*reversed(names), "step-2", "step-0000000x", ".step-00000003.host-1-0.part"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == names


def test_a_run_depends_on_content_and_not_on_paths(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data, teacher and start under other paths are the same; others under the same path are not."""
    data, model, start = (Path(shutil.copytree(world / one, tmp_path / one)) for one in ("data", "model", "run"))
    run = tmp_path / "two"

    def two(*settings: str) -> int:
        return train(monkeypatch, world, 2, f"run_folder={run}", "optimizer.decay=constant", *settings)

    assert two(f"init_from={world / 'run'}", "steps=2") == 0
    moved = (f"data=[{data}]", f"model_folder={model}", f"init_from={start}")
    assert two(*moved, "steps=3") == 0

    index = json.loads((data / "index.json").read_text())
    for sample in index["samples"]:  # as an earlier version wrote it: what was written is unknown
        del sample["latents_hash"], sample["text_hash"]
    (data / "index.json").write_text(json.dumps(index))
    shard = data / "shard-00000.safetensors"
    whole, state = shard.read_bytes(), load_file(shard)
    state["latents.4"].view(-1)[-1] += 1
    save_file(state, shard)
    assert two(*moved, "steps=4") == 2 and "(data_values was" in one_line(capsys)
    shard.write_bytes(whole)

    file = model / "diffusion_pytorch_model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    state["head.head.bias"][0] += 1
    save_file(state, file, metadata={"format": "pt"})
    assert two(*moved, "steps=4") == 2 and "teacher was" in one_line(capsys)
    file.write_bytes(whole)

    # The run goes on from its own checkpoint, and says that its start was replaced.
    spoiled(TENSORS, "blocks.0.self_attn.A_log", 0.5)(start / NEWEST)
    assert two(*moved, "steps=4") == 0
    fingerprints = [
        json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())["fingerprint"] for step in (3, 4)
    ]
    assert fingerprints[0] == fingerprints[1] and fingerprints[0]["start"]


@pytest.mark.parametrize(("name", "value"), [("eps", 1e-3), ("num_heads", 4), ("text_len", 6)])
def test_other_settings_of_the_teacher_are_another_teacher(
    name: str,
    value: float,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, model = copied_run(world, tmp_path), shutil.copytree(world / "model", tmp_path / "model")
    weights_file = next(model.glob("*.safetensors"))
    save_file(load_file(weights_file), weights_file, metadata={"format": "pt"})  # config.json alone says
    config, page = model / "config.json", json.loads((model / "config.json").read_text())
    config.write_text(json.dumps(page | {name: value}))
    flags = (f"model_folder={model}",)
    assert go_on(monkeypatch, world, run, *flags) == 2
    message = one_line(capsys)
    assert f"(architecture.{name} was {page[name]}, is {value})" in message and "damaged" not in message
    state = run / NEWEST / "state.json"
    old = json.loads(state.read_text())
    del old["fingerprint"]["architecture"]
    state.write_text(json.dumps(old))
    if name == "num_heads":
        assert go_on(monkeypatch, world, run, *flags) == 2
        assert "unless the model's config.json was changed" in one_line(capsys)
    else:
        assert go_on(monkeypatch, world, run, *flags) == 0, "a run of an earlier version does not say"
