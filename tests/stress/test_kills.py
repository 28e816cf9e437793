"""The stress test: 100 kills (slow), three of them always; and that it finds what it is there to find."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trials
from kills import run_kills
from processes import Command, Moment, Server
from safetensors.torch import save_file
from scenarios import Harm, Scenario, single_scenarios
from trees import damage, differences, hidden, tree_of
from trials import Bench

from pipelines.media.video import VideoWriter

HALVES = """
import os, pathlib, time
file = open("result.json", "w")
file.write('{"a": ')
file.flush()
open("second", "w").close()
file.write("1}")
"""
REFUSES = """
import os, pathlib, sys
if pathlib.Path("result.json").exists():
    sys.exit("it is here already")
pathlib.Path("result.json").write_text("{}")
pathlib.Path("result.yaml").write_text("a: 1")
"""
DOUBLES = """
import time
with open("result.jsonl", "a") as file:
    for number in range(3):
        file.write(f'{{"step": {number}}}\\n')
        file.flush()
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Server() as server:
        yield Bench(tmp_path_factory.mktemp("kills") / "bench", server, 0, {signal.SIGKILL: 1.0})


def scripted(folder: Path, script: str, times: int = 1) -> Scenario:
    """A scenario of a program that is not the project's."""
    (folder / "program.py").write_text(script)
    return Scenario("program", (Command(str(folder / "program.py"), ()),) * times)


def kinds(bench: Bench, scenario: Scenario, monkeypatch: pytest.MonkeyPatch, moment: Moment) -> set[str]:
    """Kinds of problems that a trial with a given moment finds."""
    bench.prepare([scenario])
    monkeypatch.setattr(trials, "draw", lambda *arguments: moment)
    trial = bench.try_out(scenario, 0)
    shutil.rmtree(trial.folder, ignore_errors=True)
    return {problem.kind for problem in trial.problems}


@pytest.mark.parametrize("place", [0, 6, 9])
def test_killed_commands_end_as_unbroken_ones(bench: Bench, place: int) -> None:
    scenario = single_scenarios(bench.world)[place]
    bench.prepare([scenario])
    trial = bench.try_out(scenario, place)
    assert not trial.problems and not bench.unsteady
    assert trial.kills and trial.statuses[-1] in (0, 2) and not trial.folder.exists()


def test_a_program_that_writes_in_place_is_found_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = Moment(signal.SIGKILL, 0.0, 2)
    assert "partial" in kinds(bench, scripted(tmp_path, HALVES), monkeypatch, moment)


def test_a_program_that_cannot_go_on_is_found_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kinds(bench, scripted(tmp_path, REFUSES), monkeypatch, Moment(signal.SIGKILL, 0.0, 2))
    assert found == {"cannot go on", "missing"}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_ends_without_a_word_or_with_too_many_is_found_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    found = kinds(bench, scripted(tmp_path, HALVES), monkeypatch, Moment(kind, 0.0, 2))
    assert f"words after {kind.name}" in found


@pytest.mark.parametrize("harm", [Harm.NONE, Harm.PAUSED])
def test_programs_that_write_into_one_file_are_found_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Harm
) -> None:
    scenario = replace(scripted(tmp_path, DOUBLES, times=2), harm=harm)
    assert "differs" in kinds(bench, scenario, monkeypatch, Moment(signal.SIGKILL, 0.0, 1))


def test_what_is_partial_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with VideoWriter(run / "a.mp4", 16, 16) as video:
        video.write(np.zeros((40, 16, 16, 3), dtype=np.uint8))
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.zeros(9)}, checkpoint / "trainables.safetensors")
    (checkpoint / "state.json").write_text("{}")
    (run / "losses.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": 2, "seconds": 2.0}\n')
    (run / ".hidden.part").touch()
    reference = tree_of(tmp_path)
    assert hidden(tmp_path) == ["run/.hidden.part"] and not damage(tmp_path, [reference])
    log = run / "losses.jsonl"
    log.write_text('{"step": 1, "seconds": 5.0}\n{"st')
    assert not damage(tmp_path, [reference]), "half of the last line is what a kill leaves"
    log.write_text('{"step": 1, "seconds": 5.0}\n{"step": 1, "seconds": 5.0}\n')
    for path in (run / "a.mp4", checkpoint / "trainables.safetensors", checkpoint / "state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(damage(tmp_path, [reference])) == 4
    assert {problem.kind for problem in differences(tree_of(tmp_path), reference)} == {"differs"}
    (checkpoint / "trainables.safetensors").unlink()
    assert any("lacks trainables" in problem.text for problem in damage(tmp_path, [reference]))
    (run / "more.json").write_text("{}")
    found = differences(tree_of(tmp_path), reference)
    assert {problem.kind for problem in found} == {"differs", "missing", "extra"}


@pytest.mark.slow
def test_nothing_is_lost_in_a_hundred_kills() -> None:
    report = run_kills(100)
    assert report.kills >= 100 and not report.problems
