"""Completion of `arl2` in shells: `arl2 completion bash`, `zsh` or `fish` writes a script for the shell to read.

    arl2 completion bash > ~/.local/share/bash-completion/completions/arl2
    arl2 completion zsh > ~/.zfunc/_arl2              # a folder of $fpath
    arl2 completion fish > ~/.config/fish/completions/arl2.fish

The script holds all commands and flags, so that pressing TAB starts no Python. Write it again after an update.
"""

import argparse
import runpy
import sys

from pipelines.console.commands import COMMANDS, COMPLETION, PROGRAM, Command
from pipelines.console.shipped import ROOT
from pipelines.flags import Parser, parser_of
from wan.utils.errors import InputError

SHELLS = ("bash", "zsh", "fish")
_PATHS = ("PATH", "FILE")
"""Metavars of flags whose values are files or folders."""


def completion_parser() -> Parser:
    """The command line of `arl2 completion`."""
    parser = Parser(__doc__)
    parser.prog = f"{PROGRAM} {COMPLETION}"
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    return parser


def command_parser(command: Command) -> Parser:
    """The parser of a command."""
    script = runpy.run_path(str(ROOT / command.script), run_name=f"{PROGRAM}_completion")
    parser = parser_of(script["main"])
    parser.prog = f"{PROGRAM} {command.name}"
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """A parser of everything that `arl2` understands, for what reads parsers; it is not parsed with."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("--version", action="store_true", help="say the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        own = command_parser(command)
        commands.add_parser(command.name, help=command.about, parents=[own], add_help=False)
    about = "write the completion of a shell"
    commands.add_parser(COMPLETION, help=about, parents=[completion_parser()], add_help=False)
    return parser


def write_completion() -> int:
    """Parse, import all scripts, write."""
    shell = completion_parser().parse_args().shell
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion is written by shtab, which is not installed: pip install 'shtab>=1.13'") from error
    parser = whole_parser()
    for action in _actions(parser):
        if action.metavar in _PATHS:
            vars(action)["complete"] = shtab.FILE
    sys.stdout.write(shtab.complete(parser, shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Actions of a parser and of its commands."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found += [one for inner in action.choices.values() for one in _actions(inner)]
    return found
