"""Where a script cannot write, it says so at once: in one line, with status 2, before it loads or measures anything."""

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from paths import GOLDEN, ROOT

from pipelines.generation.random_model import random_pipeline
from wan.utils.locks import exclusive
from wan.vae.wan_vae import TOY_VAE

TOY = str(ROOT / "configs/toyworld/inference.yaml")
BENCHMARK = str(ROOT / "configs/toyworld/benchmark.yaml")
PROMPTS = str(ROOT / "prompts/toyworld.txt")


@dataclass
class Script:
    """A script, its flags, what it must not come to, and the lock that it holds."""

    name: str
    flags: str
    work: str
    lock: str = ""


SCRIPTS = [
    Script("verify", f"{GOLDEN} --json {{target}}", "verify_folder"),
    Script("select_layers", f"--config {TOY} --method random --yaml {{target}}", "score_by_file"),
    Script(
        "profile_generation", f"--config {BENCHMARK} --row hybrid-75-window --device cpu --json {{target}}", "measure"
    ),
    Script("toyworld_samples", "--folder {target}", "first_video"),
    Script("toyworld_study", "--device cpu --part data --work {target}", "run_part"),
    Script("sample_suite", f"--config {TOY} --device cpu --suite hundred --output_folder {{target}}", "load_pipeline"),
    Script("download_suites", "--suite vbench --output_folder {target}", "fetch"),
    Script("make_random_model", "--size toy --layout diffusers --folder {target}", "random_pipeline"),
]
LOCKED = [
    Script("probe_memory", f"--config {TOY} --json {{target}}", "probe", ".target.lock"),
    Script(
        "select_layers",
        f"--config {TOY} --device cpu --yaml {{folder}}/x.yaml --method replacement --checkpoint_path models/toyworld "
        f"--data_path {PROMPTS} --json {{target}}",
        "read_generator",
        ".target.lock",
    ),
    Script(
        "benchmark",
        f"--config {BENCHMARK} --device cpu --output_folder {{target}}",
        "pipelines.benchmark.suite.start_run",
        "target/.benchmark.json.lock",
    ),
    Script(
        "benchmark_training",
        "--device cpu --output_folder {target}",
        "pipelines.benchmark.training.measure_ceilings",
        "target/.training.json.lock",
    ),
    Script(
        "probe_memory",
        f"--config {TOY} --times 4 --json {{target}}",
        "load_pipeline",
        ".target.lock",
    ),
    Script(
        "evaluate",
        f"{ROOT / 'docs/images'} --json {{target}}",
        "pipelines.evaluation.scoring.run.measure_clip",
        ".target.lock",
    ),
    Script("draw_latents", "--device cpu --folder {target}", "pipelines.toyworld.draw.load_vae", "target/.lock"),
    Script("build_toyworld", "--device cpu --work {target}", "run_steps", "target/.lock"),
    Script(
        "generate_latents",
        f"--config {TOY} --device cpu --folder {{target}} --data_path {PROMPTS}",
        "Teacher",
        "target/.lock",
    ),
    Script(
        "encode_videos",
        f"--config {TOY} --device cpu --folder {{target}} --videos {{folder}}/videos.tsv",
        "load_vae",
        "target/.lock",
    ),
]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script that must not begin to work; returns its one line."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "videos.tsv").write_text(f"{ROOT / 'docs/images/toyworld_samples.mp4'}\ta shape\n")

    def run(script: Script) -> str:
        module = import_module(script.name)
        owner, _, name = script.work.rpartition(".")
        monkeypatch.setattr(import_module(owner) if owner else module, name, lambda *a, **b: pytest.fail("it began"))
        flags = script.flags.format(target=tmp_path / "out" / "target", folder=tmp_path).split()
        monkeypatch.setattr(sys, "argv", [script.name, *flags])
        assert module.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert files <= {"videos.tsv", "out", Path(script.lock).name}, "nothing is left"
        return error

    return run


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let files have so many bytes at most: what is written beyond fails, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("script", [*SCRIPTS, *LOCKED], ids=lambda script: script.name)
def test_a_target_is_tried_before_the_work(script: Script, call: Callable[..., str], tmp_path: Path) -> None:
    with limited(1024):
        assert "cannot write" in call(script)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").write_text("in the way")
    assert "cannot write" in call(script)


@pytest.mark.parametrize("script", LOCKED, ids=lambda script: script.name)
def test_a_second_process_is_refused_at_once(script: Script, call: Callable[..., str], tmp_path: Path) -> None:
    with exclusive(tmp_path / "out" / script.lock, "x"):
        assert f"is in use by process {os.getpid()}" in call(script)


def test_a_model_takes_the_place_of_a_model_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = import_module("make_random_model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    flags = ["--size", "toy", "--layout", "diffusers", "--device", "cpu", "--folder"]
    monkeypatch.setattr(sys, "argv", ["make_random_model.py", *flags, str(tmp_path / "home")])
    assert script.main() == 2 and "holds no model that could be replaced" in capsys.readouterr().err
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
    small = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4})
    monkeypatch.setattr(script, "random_pipeline", lambda *args, **kwargs: small)
    monkeypatch.setattr(sys, "argv", ["make_random_model.py", *flags, str(tmp_path / "model")])
    with limited(100_000):
        assert script.main() == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: cannot write") and not (tmp_path / "model").exists()
    assert script.main() == 0 and script.main() == 0 and (tmp_path / "model" / "model_index.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "model"}
