"""Runs `arl2 COMMAND …`: the command's script, as Python runs it by its path."""

import runpy
import sys
from collections.abc import Callable
from functools import partial

from arl2 import __version__, end_on_signals
from pipelines.cli import entry_point
from pipelines.console.commands import COMPLETION, PROGRAM, Command, find_command, nearest, overview, running
from pipelines.console.shipped import ROOT
from wan.utils.errors import InputError


def main() -> int:
    """Answer a command line of `arl2`; a script ends with its own status, in an exception as Python's own exit."""
    end_on_signals()
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return _answered(partial(_write, overview()))
    if name == "--version":
        return _answered(partial(_write, f"{PROGRAM} {__version__}, files in {ROOT}\n"))
    if name == COMPLETION:
        sys.argv = [PROGRAM, *words]
        from pipelines.console.completion import write_completion  # imports every script, and torch with them

        return _answered(write_completion)
    command = find_command(name)
    if command is None:
        return _answered(partial(_refuse, name))
    run_script(command, words)
    return 0


def run_script(command: Command, words: list[str]) -> None:
    """Run a command's script as the main module; its help and messages name the command."""
    sys.argv = [command.script, *words]
    running.set(command)
    runpy.run_path(str(ROOT / command.script), run_name="__main__")


def _answered(answer: Callable[[], int]) -> int:
    return entry_point()(answer)()


def _write(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _refuse(name: str) -> int:
    near = nearest(name)
    meant = f": did you mean {near}?" if near else ";"
    raise InputError(f"no command {name!r}{meant} {PROGRAM} --help lists all commands")
