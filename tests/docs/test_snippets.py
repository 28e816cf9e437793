"""Commands and snippets of README and guides: those marked `<!-- run -->` run here, all others name what exists.

Blocks marked with one name, `<!-- run NAME -->`, run one after the other in one working directory; those called slow
only with `-m slow`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^(?:<!-- run ?(\w*) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"--[A-Za-z]\w*")
SETTING = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=")
REPEATED = ("configs", "models", "prompts", "scripts", "tests", "inference.py", "train_stage1.py", "train_stage2.py")
"""What commands expect in the working directory."""
REFERENCE = str(ROOT / "docs" / "site" / "reference.py")


class Snippet(NamedTuple):
    """A fenced block.

    Attributes:
        page: its page and the line of its beginning.
        language: python, bash or none.
        text: its content.
        run: name of its group, its page where the mark has no name; empty where it is not marked.
    """

    page: str
    language: str
    text: str
    run: str


def snippets() -> list[Snippet]:
    """All blocks of all pages, each text once."""
    found: dict[str, Snippet] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            place = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
            one = Snippet(place, match[2], match[3], "" if match[1] is None else match[1] or place)
            if one.text not in found or one.run:
                found[one.text] = one
    return list(found.values())


SNIPPETS = snippets()
GROUPS = {name: [one for one in SNIPPETS if one.run == name] for name in {one.run for one in SNIPPETS} - {""}}


def commands(text: str) -> Iterator[list[str]]:
    """Words of the commands in a block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r";|&&|\|", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue  # output, not a command
            if words:
                yield words


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Scripts that a block starts, with their arguments."""
    for words in commands(text):
        scripts = [place for place, word in enumerate(words) if word.endswith(".py") and "/" not in word[:1]]
        if scripts and {"python", "torchrun", ".venv/bin/python"} & set(words[: scripts[0]]):
            yield words[scripts[0]], words[scripts[0] + 1 :]


@cache
def helps() -> dict[str, str]:
    """`--help` of every script, by its path."""
    scripts = sorted({script for one in SNIPPETS for script, _ in calls(one.text) if (ROOT / script).is_file()})
    done = subprocess.run([sys.executable, REFERENCE, *scripts], cwd=ROOT, check=True, capture_output=True, text=True)
    pages: dict[str, str] = json.loads(done.stdout)
    return pages


@cache
def settings() -> set[str]:
    """Names of all settings, and of what they are nested in."""
    script = "import reference; print(reference.settings_page())"
    place = {"cwd": Path(REFERENCE).parent, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, **place)
    names = set(re.findall(r"^\| `([\w.]+)`", done.stdout, re.MULTILINE))
    return names | {name.rpartition(".")[0] for name in names if "." in name}


def test_there_are_snippets() -> None:
    assert len(GROUPS) >= 5 and sum(1 for one in SNIPPETS for _ in calls(one.text)) >= 30


@pytest.mark.parametrize("one", SNIPPETS, ids=lambda one: one.page)
def test_commands_name_scripts_flags_and_settings_that_exist(one: Snippet) -> None:
    for script, arguments in calls(one.text):
        assert (ROOT / script).is_file(), f"{one.page} starts {script}"
        known = set(FLAG.findall(helps()[script]))
        flags = {word.partition("=")[0] for word in arguments if FLAG.match(word)}
        assert not flags - known, f"{one.page}: {script} has no {sorted(flags - known)}"
        if "key=value" in helps()[script]:
            given = {match[1] for word in arguments if (match := SETTING.match(word))} - settings()
            unknown = [name for name in given if not is_named_path(name, arguments)]
            assert not unknown, f"{one.page}: no setting {unknown}"


def is_named_path(name: str, arguments: list[str]) -> bool:
    """Whether `name=…` is a value of a flag that takes NAME=PATH."""
    places = [place for place, word in enumerate(arguments) if word.startswith(f"{name}=")]
    before = [next((word for word in reversed(arguments[:place]) if word.startswith("--")), "") for place in places]
    return all(flag in {"--also", "--checkpoint_path"} for flag in before)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working directory in which commands of the documents find what they name."""
    for name in REPEATED:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("slow")) for name in sorted(GROUPS)]
)
def test_what_is_marked_runs_as_pasted(name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    for one in GROUPS[name]:
        shell = [sys.executable, "-c"] if one.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run([*shell, one.text], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{one.page}: {done.stderr[-3000:]}"
