"""The table of `arl2`'s commands, its help, its answers, and how it runs a script."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from paths import ROOT

from arl2 import __version__
from pipelines.console import commands
from pipelines.console.commands import COMMANDS, GROUPS, find_command, in_words_of_console, nearest, overview, running
from wan.utils.signals import GO_ON

SCRIPTS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.py")}
ENTRY_POINTS = {"inference.py", "train_stage1.py", "train_stage2.py"}


def arl2(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m arl2`."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    line = [sys.executable, "-m", "arl2", *words]
    return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def under_console() -> ExitStack:
    """Makes this process one that runs `arl2 bench`, until the test ends."""
    with ExitStack() as stack:
        stack.callback(running.reset, running.set(COMMANDS["bench"]))
        yield stack


def test_every_script_is_one_command() -> None:
    scripts = [command.script for group in GROUPS.values() for command in group]
    assert len(scripts) == len(set(scripts)) == len(COMMANDS)
    assert set(scripts) == SCRIPTS | ENTRY_POINTS, "a new script needs a line in pipelines/console/commands.py"


def test_names_are_understood_with_underscores_and_as_the_scripts_are_called() -> None:
    assert find_command("train_stage1") is find_command("train-stage1") is COMMANDS["train-stage1"]
    assert find_command("benchmark.py") is find_command("benchmark") is COMMANDS["bench"]
    assert find_command("inference") is COMMANDS["generate"]
    assert find_command("benhc") is None and nearest("benhc") == "bench"
    assert nearest("genrate_latents") == "generate-latents" and nearest("completoin") == "completion"
    assert nearest("xyzzy") is None


def test_the_help_fits_and_names_every_command_once() -> None:
    lines = overview().splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [*COMMANDS, commands.COMPLETION]


def test_help_version_and_errors_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['arl2', *sys.argv[1:]]; from pipelines.console.run import main; status = main(); "
        "assert not {'torch', 'numpy', 'yaml'} & sys.modules.keys(), 'heavy'; sys.exit(status)"
    )
    for words, status, output, error in (
        ((), 0, overview(), ""),
        (("--help",), 0, overview(), ""),
        (("--version",), 0, f"arl2 {__version__}, files in {ROOT}\n", ""),
        (("benhc",), 2, "", "error: no command 'benhc': did you mean bench? arl2 --help lists all commands\n"),
        (("xyzzy",), 2, "", "error: no command 'xyzzy'; arl2 --help lists all commands\n"),
    ):
        line = [sys.executable, "-c", code, *words]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (status, output, error)


def test_a_command_is_its_script(tmp_path: Path) -> None:
    """Help is the script's own in the words of the command; statuses, and files that come with it, are the same."""
    done = arl2("make_tables", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: arl2 make-tables ")
    assert "arl2 make-tables output/bench" in done.stdout and "scripts/" not in done.stdout
    missing = arl2("make-tables", "none.json", cwd=tmp_path)
    script = [sys.executable, str(ROOT / "scripts" / "make_tables.py"), "none.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    same = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert missing.returncode == same.returncode == 2 and missing.stderr == same.stderr != ""


def test_torchrun_starts_commands(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "arl2"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["make-tables", "--help"]
    done = subprocess.run([*line, *words], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("usage: arl2 make-tables") == 2


def test_texts_name_commands_in_the_place_of_scripts(under_console: ExitStack) -> None:
    assert in_words_of_console("python scripts/benchmark.py --quick") == "arl2 bench --quick"
    assert in_words_of_console("make one with scripts/select_layers.py") == "make one with arl2 select-layers"
    assert in_words_of_console("torchrun --nproc_per_node 8 train_stage2.py --config a.yaml") == (
        "torchrun --nproc_per_node 8 -m arl2 train-stage2 --config a.yaml"
    )
    assert in_words_of_console("torchrun --nproc_per_node 2 \\\n  scripts/profiling/benchmark_training.py") == (
        "torchrun --nproc_per_node 2 \\\n  -m arl2 bench-training"
    )
    for same in ("wan/ops/attention.py", "my/inference.py", "setup.py", "torchrun x.py"):
        assert in_words_of_console(same) == same


def test_texts_of_scripts_stay_as_they_are() -> None:
    assert in_words_of_console("python scripts/benchmark.py") == "python scripts/benchmark.py"


def test_the_document_names_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `arl2 ")]
    named = [name for cell in cells for name in cell.replace("`", "").replace("arl2 ", "").strip().split(", ")]
    assert sorted(named) == sorted(COMMANDS)


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads handlers from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_imports_is_one_line(number: signal.Signals) -> None:
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "arl2", "select-layers", "--help"]
    process = subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number and errors == f"interrupted: {GO_ON}\n"
