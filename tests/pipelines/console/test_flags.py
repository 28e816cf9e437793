"""All programs speak one language: the same flag for the same thing, and a help that says what goes without it."""

import argparse

import pytest

from pipelines.console.commands import COMMANDS
from pipelines.console.completion import command_parser
from pipelines.flags import Parser

OTHER_NAMES = {
    "--folder": "--output_folder",
    "--output_dir": "--output_folder",
    "--work": "--output_folder",
    "--metrics_dir": "--metrics_folder",
    "--videos": "--num_videos",
    "--frames": "--num_output_frames (latent frames) or --num_frames (frames of pixels)",
    "--latent_frames": "--num_output_frames",
    "--samples": "--videos_per_prompt",
    "--only": "--rows",
    "--backend": "--attention_backend",
    "--stage_settings": "--set",
    "--checkpoint": "--checkpoint_path",
    "--prompts": "--data_path",
    "--model": "--model_folder",
    "--config_path": "--config",
}
"""Names that some programs had, or could have, for what all others call otherwise."""
FORMER = {
    "generate": {"--config_path", "--metrics_dir"},
    "build-toyworld": {"--work", "--videos"},
    "toyworld-study": {"--work", "--only", "--videos", "--model"},
    "long-study": {"--work", "--only"},
    "probe": {"--only", "--videos"},
    "measure-switches": {"--videos"},
    "draw-latents": {"--videos", "--folder", "--latent_frames"},
    "sample-suite": {"--samples"},
    "reproduce": {"--samples"},
    "verify": {"--backend"},
    "bench-training": {"--frames"},
    "bench-loading": {"--frames", "--stage_settings"},
    "bench-offloading": {"--latent_frames"},
    "profile": {"--frames"},
    "generate-latents": {"--folder"},
    "encode-videos": {"--folder", "--videos"},
}
"""Names that earlier versions had; scripts of users have them."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """The parser of every command."""
    return {name: command_parser(command) for name, command in COMMANDS.items()}


def actions(parser: Parser) -> list[argparse.Action]:
    """What a command line may hold, but for --help."""
    return [action for action in parser._actions if action.dest != "help"]


def test_the_same_thing_has_the_same_name(parsers: dict[str, Parser]) -> None:
    found = {flag for parser in parsers.values() for action in actions(parser) for flag in action.option_strings}
    assert not found & OTHER_NAMES.keys()
    assert not {flag for flag in found if "-" in flag.strip("-")}, "underscores; dashes are understood"


def test_flags_of_the_same_name_take_the_same(parsers: dict[str, Parser]) -> None:
    """The same number of values, and paths everywhere or nowhere."""
    taken: dict[str, set[tuple[object, bool]]] = {}
    for parser in parsers.values():
        for action in actions(parser):
            for flag in action.option_strings:
                taken.setdefault(flag, set()).add((action.nargs, action.metavar in ("PATH", "FILE")))
    several = {flag for flag, kinds in taken.items() if len(kinds) > 1}
    # Of several models by name; of one suite or several; of one world or a mixture.
    assert several <= {"--checkpoint_path", "--suite", "--world"}, several


def test_the_help_says_what_a_flag_does_and_what_goes_without_it(parsers: dict[str, Parser]) -> None:
    silent = []
    for name, parser in parsers.items():
        for action in actions(parser):
            assert action.help, (name, action.dest)
            has_default = action.nargs != 0 and action.default not in (None, [], "")
            silent += [(name, action.dest)] if has_default and "default" not in action.help else []
    assert not silent


def test_former_names_are_understood(parsers: dict[str, Parser]) -> None:
    for name, former in FORMER.items():
        parser = parsers[name]
        known = {flag for action in actions(parser) for flag in action.option_strings}
        for flag in former:
            assert parser._current(flag) in known - {flag}, (name, flag)
            assert parser._current(flag.replace("_", "-")) in known, "dashes too"


def test_what_many_programs_have_stands_in_one_group_of_the_help(parsers: dict[str, Parser]) -> None:
    places: dict[str, set[str | None]] = {}
    for parser in parsers.values():
        for group in parser._action_groups:
            for action in group._group_actions:
                for flag in action.option_strings or [action.dest]:
                    places.setdefault(flag, set()).add(group.title)
    assert places["--config"] == places["settings"] == {"input"}
    assert places["--output_folder"] == {"results"} and places["--device"] == {"device"}
