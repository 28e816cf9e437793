"""Motion smoothness by VBench's own function, which a process of VBench's environment calls."""

import math
from pathlib import Path
from typing import Any

import torch

from pipelines.evaluation.scoring.metric import Clip, Direction, Measure, Metric, NotMeasuredError, Spec
from pipelines.evaluation.scoring.metrics.elsewhere.process import Worker
from pipelines.evaluation.scoring.weights import AMT, WeightFolder
from pipelines.prompts.names import shown
from wan.utils.files import content_hash

DEFAULT_PYTHON = Path(".venv-vbench/bin/python")
PROGRAM = Path(__file__).parent / "elsewhere" / "vbench_worker.py"
SUFFIX = ".mp4"
"""VBench reads no other videos."""
MIN_FRAMES = 3
"""Two that are kept, and the one between them."""
MULTIPLE, MIN_PADDED_SIDE = 16, 128
"""VBench pads sides to a multiple. AMT-S gives NaN for smaller ones, of which VBench makes a number all the same."""


class MotionSmoothness(Metric):
    """Likeness of frames to those that AMT-S interpolates.

    Args:
        worker: a process that has loaded VBench.
        versions: of the worker's packages.
        weights: hash of AMT-S' file.
    """

    SPEC = Spec(
        "motion_smoothness",
        f"make vbench-env, {AMT.file}",
        Direction.HIGHER,
        "0 to 1",
        "likeness of every other frame to one that AMT-S interpolates from its neighbours",
        "vbench 0.1.5, vbench/motion_smoothness.py, called in an environment of its own",
    )

    def __init__(self, worker: Worker, versions: dict[str, Any], weights: str) -> None:
        self._worker, self._versions, self._weights = worker, versions, weights

    @classmethod
    def load(cls, python: Path, weights: WeightFolder, device: torch.device) -> "MotionSmoothness":
        """Start VBench and let it load AMT-S.

        Raises:
            NotMeasuredError: no environment of VBench, no weights, or VBench does not take them.
        """
        if not python.is_file():
            raise NotMeasuredError(
                f"no environment of VBench at {shown(python)}: run make vbench-env, or give --vbench_python FILE"
            )
        path = weights.find(AMT)
        worker = Worker(python, PROGRAM)
        versions = worker.ask({"checkpoint": str(path.absolute()), "device": str(device)}).get("versions")
        if not isinstance(versions, dict):
            raise NotMeasuredError(f"{shown(python)} does not say which VBench it has: run make vbench-env")
        return cls(worker, versions, content_hash(path))

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._weights, "vbench": self._versions.get("vbench")}

    def origin(self) -> dict[str, Any]:
        """See `Metric`: what else VBench ran with."""
        return {name: version for name, version in self._versions.items() if name != "vbench"}

    def begin(self, clip: Clip) -> Measure:
        """Never called, since the value is known."""
        raise NotImplementedError

    def known(self, clip: Clip) -> float:
        """See `Metric`; VBench decodes the video itself.

        Raises:
            NotMeasuredError: VBench cannot read it.
        """
        if clip.path.suffix != SUFFIX:
            raise NotMeasuredError(f"VBench reads {SUFFIX} alone")
        if clip.num_frames < MIN_FRAMES:
            raise NotMeasuredError(f"it has fewer than {MIN_FRAMES} frames")
        if min(clip.height, clip.width) <= MIN_PADDED_SIDE - MULTIPLE:
            raise NotMeasuredError(f"AMT-S takes no frames with a side of {MIN_PADDED_SIDE - MULTIPLE} pixels or less")
        value = self._worker.ask({"video": str(clip.path.absolute())}).get("value")
        if not isinstance(value, float) or not math.isfinite(value):
            raise NotMeasuredError("it gives numbers that are not finite")
        return value
