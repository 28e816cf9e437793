"""Version, release notes and citation say the same."""

import re
import subprocess
import sys

from paths import ROOT

from arl2 import __version__
from pipelines.yaml_files import read_mapping


def test_the_version_stands_in_one_place_and_is_told_alike() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    line = [sys.executable, "setup.py", "--version"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert told == newest[1] == read_mapping(ROOT / "CITATION.cff", "citation")["version"] == __version__


def test_the_citation_has_what_readers_of_it_ask_for() -> None:
    page = read_mapping(ROOT / "CITATION.cff", "citation")
    assert page["cff-version"] == "1.2.0" and page["message"] and page["title"] and page["authors"]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'license="{page["license"]}"' in setup
    assert all({"type", "title", "authors", "url"} <= reference.keys() for reference in page["references"])
