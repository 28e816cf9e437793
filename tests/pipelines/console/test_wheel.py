"""A built wheel, installed away from the checkout, runs what ships in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from paths import ROOT

from pipelines.media.video import read_video

NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
PACKAGES = ("wan", "arl2", "pipelines")
SHIPPED_FOLDERS = ("scripts", "configs", "prompts", "models/toyworld")
SHIPPED_FILES = (
    *("inference.py", "train_stage1.py", "train_stage2.py"),
    "docs/results/distillation/study/stage1.safetensors",
)
MAX_BYTES = 30 * 10**6
SETUPTOOLS = 77
"""The first release that pyproject.toml takes."""


def run(*line: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that must end well."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(list(map(str, line)), cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout."""
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools {SETUPTOOLS} or newer builds the wheel: pip install -r requirements-dev.txt")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*NEEDED, *SHIPPED_FILES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in (*PACKAGES, *SHIPPED_FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "configs" / "notes.txt").write_text("no part of it")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, ".", cwd=source)
    (found_wheel,) = target.glob("arl2-*.whl")
    return found_wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_what_ships_and_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert set(PACKAGES) == {top for top in tops if not top.endswith(".dist-info")}
    shipped = {name.partition("console/checkout/")[2] for name in names if "console/checkout/" in name}
    wanted = [path for name in SHIPPED_FOLDERS for path in (ROOT / name).rglob("*")]
    files = [path for path in wanted if path.is_file() and "__pycache__" not in path.parts]
    assert shipped == {path.relative_to(ROOT).as_posix() for path in files} | set(SHIPPED_FILES)


def test_commands_of_the_wheel_work_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(site)}

    def arl2(*words: str) -> subprocess.CompletedProcess[str]:
        return run(site / "bin" / "arl2", *words, cwd=tmp_path, **environment)

    assert arl2("--help").stdout.startswith("usage: arl2 COMMAND")
    assert str(site) in arl2("--version").stdout
    config = ("--config", "configs/toyworld/inference.yaml", "--device", "cpu")
    arl2("generate", *config, "--prompt", "a red ring", "--num_output_frames", "3", "--output_folder", "videos")
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert read_video(video).shape == (9, 64, 96, 3)
    arl2("draw-latents", "--num_videos", "2", "--num_output_frames", "6", "--output_folder", "data/toyworld")
    stage1 = ("--config", "configs/toyworld/stage1.yaml", "--device", "cpu")
    arl2("train-stage1", *stage1, "steps=2", "batch=1", "optimizer.warmup_steps=1", "sample_every=0")
    assert (tmp_path / "runs" / "toyworld" / "stage1" / "export").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "data", "runs"}
