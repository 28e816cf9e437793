"""A program for the environment of VBench, which has nothing of this project: VBench's motion smoothness of videos.

Reads lines of JSON and answers each with one. The first is {"checkpoint": file, "device": name}, answered with
{"versions": of packages}; every later one is {"video": file}, answered with {"value": number}. What fails is answered
with {"error": text}. The program ends with its input.
"""

import json
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

PACKAGES = ("vbench", "torch", "numpy", "opencv-python")
CONFIG = Path("cfgs") / "AMT-S.yaml"


def main() -> None:
    """Answer requests."""
    answers = _own_output()
    model: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model = _load(**request)
                answer: dict[str, Any] = {"versions": _versions()}
            else:
                answer = {"value": float(model.motion_score(request["video"]))}
        except Exception as error:  # whatever it is, the other side decides
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _own_output() -> TextIO:
    """Where answers go; whatever libraries print goes to standard error from now on."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _load(checkpoint: str, device: str) -> Any:
    """VBench's motion smoothness, with the network of a file."""
    torch = import_module("torch")
    module = import_module("vbench.motion_smoothness")
    package = import_module("vbench.third_party.amt")
    return module.MotionSmoothness(str(Path(next(iter(package.__path__))) / CONFIG), checkpoint, torch.device(device))


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    main()
