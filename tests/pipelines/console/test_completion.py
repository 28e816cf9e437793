"""Completion of shells, and the parsers that it is made of."""

import subprocess
import sys

import pytest

from pipelines.cli import entry_point
from pipelines.console.commands import COMMANDS
from pipelines.console.completion import completion_parser
from pipelines.flags import Parser, parser_of

pytest.importorskip("shtab", reason="pip install -r requirements.txt")


@pytest.fixture(scope="module")
def bash() -> str:
    """The completion of bash, as a user has it written."""
    line = [sys.executable, "-m", "arl2", "completion", "bash"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def completed(script: str, *words: str) -> set[str]:
    """What bash offers for the last of some words."""
    spoken = " ".join(f"'{word}'" for word in words)
    lines = [script, f"COMP_WORDS=({spoken})", f"COMP_CWORD={len(words) - 1}", "COMP_TYPE=9", "_shtab_arl2"]
    lines += ["printf '%s\\n' \"${COMPREPLY[@]}\""]
    done = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True, check=True)
    return {word.strip() for word in done.stdout.split()}


def test_bash_offers_commands_flags_and_choices(bash: str) -> None:
    assert {"generate", "train-stage1", "completion"} <= completed(bash, "arl2", "")
    assert completed(bash, "arl2", "train-") == {"train-stage1", "train-stage2"}
    assert completed(bash, "arl2", "generate", "--num_o") == {"--num_output_frames"}
    assert completed(bash, "arl2", "generate", "--no_fas") == {"--no_fast_vae"}
    assert completed(bash, "arl2", "generate", "--parallel", "v") == {"video"}
    assert completed(bash, "arl2", "completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_written(shell: str, bash: str) -> None:
    line = [sys.executable, "-m", "arl2", "completion", shell]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert text != bash and all(name in text for name in COMMANDS) and "num_output_frames" in text


def test_the_parser_of_an_entry_point_is_had_without_running_it() -> None:
    done = []

    @entry_point()
    def main() -> int:
        completion_parser().parse_args()
        done.append(1)
        return 0

    assert isinstance(parser_of(main), Parser) and not done
    with pytest.raises(ValueError, match="parses no command line"):
        parser_of(lambda: 0)
    assert completion_parser().parse_args(["zsh"]).shell == "zsh", "afterwards parsers parse again"
