"""The documentation site builds without a warning: every link, every page of the menu, every documented name."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("mkdocs", reason="the site needs mkdocs: make install")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_generated_pages_hold_every_command_and_setting(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for script in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")):
        assert script.name == "setup.py" or f"{script.name}</h2>" in commands or f"{script.name}<" in commands
    for name in ("memory.window_frames", "optimizer.lr", "state.rotation", "budget"):
        assert f"<code>{name}</code>" in settings


def test_every_setting_says_what_it_means(site: Path) -> None:
    rows = (site / "reference" / "settings.html").read_text(encoding="utf-8").split("<tr>")
    cells = [row.split("<td>")[1:] for row in rows if "<td>" in row]
    assert len(cells) > 150
    silent = [row[0] for row in cells if len(row) != 4 or row[3].startswith(("</td>", "see <code>"))]
    assert not silent


def texts_of(path: Path) -> Iterator[str]:
    """Texts in a file; … for what is put in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
        yield "".join(text for text in texts if isinstance(text, str))


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rooms = (ROOT / room for room in ("wan", "arl2", "pipelines"))
    code = "\n".join(text for room in rooms for path in room.rglob("*.py") for text in texts_of(path))
    firsts = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    messages = [part for first in firsts if first.startswith(" `") for part in first.split("`")[1::2]]
    pieces = {piece.strip() for message in messages for piece in message.split("…")} - {""}
    assert len(pieces) > 10
    assert not {piece for piece in pieces if piece not in code}
