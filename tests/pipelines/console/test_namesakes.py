"""Other packages that are called wan or pipelines."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


def imported(*paths: Path, line: tuple[str, ...] = ("-c", "import arl2")) -> subprocess.CompletedProcess[str]:
    """Run Python where packages are looked for in `paths` first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *line]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def foreign(folder: Path, name: str) -> Path:
    """Write a package of some other project; returns its file."""
    file = folder / name / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text('"""Of another project."""\nraise RuntimeError("it was imported")\n')
    return file


@pytest.mark.parametrize("name", ["wan", "pipelines"])
def test_a_foreign_package_that_is_found_first_is_named(name: str, tmp_path: Path) -> None:
    file = foreign(tmp_path, name)
    for line in (("-c", "import arl2"), (str(ROOT / "scripts" / "demo.py"), "--help")):
        error = imported(tmp_path, ROOT, line=line).stderr.splitlines()[-1]
        assert error == (
            f"ImportError: arl2 needs its own package {name}, but Python finds {file}: take that off PYTHONPATH and "
            f"the working directory, or uninstall it, or put {ROOT} first on PYTHONPATH"
        )
    assert imported(ROOT, tmp_path).returncode == 0, "behind ours it does no harm"


def test_a_folder_of_that_name_without_a_package_is_named(tmp_path: Path) -> None:
    for name in ("arl2", "wan"):
        shutil.copytree(ROOT / name, tmp_path / "ours" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "theirs" / "pipelines").mkdir(parents=True)
    done = imported(tmp_path / "ours", tmp_path / "theirs")
    assert f"Python finds {tmp_path / 'theirs' / 'pipelines'}: take that off" in done.stderr.splitlines()[-1]


def test_a_package_that_was_installed_over_ours_is_named(tmp_path: Path) -> None:
    for name in ("arl2", "wan", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert imported(tmp_path).returncode == 0
    (tmp_path / "wan" / "__init__.py").write_text("from . import configs, distributed, modules\n")
    error = imported(tmp_path).stderr.splitlines()[-1]
    assert error.startswith("ImportError: another project's wan was installed over that of arl2, in ")
