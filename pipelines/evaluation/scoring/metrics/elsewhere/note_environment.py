"""A program for the environment of VBench or FastVideo: notes beside a file of results what made it.

    .venv-vbench/bin/python pipelines/evaluation/scoring/metrics/elsewhere/note_environment.py RESULTS.json

It writes RESULTS.made_with.json: a hash of the results, versions of packages, and hashes of the files of weights that
VBench and FastVideo keep. Run it after them, in the same environment; evaluate.py reads the note with the results. It
needs nothing but Python.
"""

import argparse
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "vbench",
    "fastvideo",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "opencv-python",
    "decord",
    "timm",
    "pyiqa",
    "openai-clip",
    "detectron2",
    "dreamsim",
    "lpips",
    "ptlflow",
)
DIGITS = 32
NOTE_SUFFIX = ".made_with.json"


def weight_folders() -> list[Path]:
    """Where VBench and FastVideo keep what they download."""
    cache = Path.home() / ".cache"
    root = Path(os.environ.get("FASTVIDEO_CACHE_ROOT", cache / "fastvideo"))
    return [
        Path(os.environ.get("VBENCH_CACHE_DIR", cache / "vbench")),
        Path(os.environ.get("FASTVIDEO_EVAL_CACHE", root / "eval")),
    ]


def content_hash(path: Path) -> str:
    """SHA-256 of a file, as many digits of it as the project's own hashes have."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()[:DIGITS]


def main() -> None:
    """Write the note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="what VBench or FastVideo wrote")
    about = "folders of weights; by default the caches of VBench and FastVideo"
    parser.add_argument("--weights", type=Path, nargs="+", metavar="FOLDER", help=about)
    arguments = parser.parse_args()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    weights = {}
    for folder in arguments.weights or weight_folders():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                weights[path.relative_to(folder.parent).as_posix()] = content_hash(path)
    note = {"results": content_hash(arguments.results), "versions": versions, "weights": weights}
    target: Path = arguments.results.with_suffix(NOTE_SUFFIX)
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)


if __name__ == "__main__":
    main()
