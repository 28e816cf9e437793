"""A program that runs in another environment and answers lines of JSON."""

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.evaluation.scoring.metric import NotMeasuredError
from pipelines.prompts.names import shown

VARIABLES_OF_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What the other environment must not see: our packages, and our place among processes."""
TENSORS_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
"""PyTorch then reads tensors of a checkpoint and runs no code in it, whatever the caller says by default."""
WAIT_SECONDS = 5.0


class Worker:
    """A process of another environment. It ends with this object, and with this process.

    Args:
        python: the environment's interpreter.
        program: what it runs.

    Raises:
        NotMeasuredError: it cannot be started.
    """

    def __init__(self, python: Path, program: Path) -> None:
        self._python = python
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES_OF_OURS}
        try:
            self._process = subprocess.Popen(
                [str(python), "-u", str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=kept | TENSORS_ONLY,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for us, who decide
            )
        except OSError as error:
            raise NotMeasuredError(f"{shown(python)} does not start ({error.strerror})") from error
        self._finalizer = weakref.finalize(self, _end, self._process)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One answer to one request.

        Raises:
            NotMeasuredError: the process ended, answered something else, or could not do it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "null")
        except (OSError, ValueError) as error:
            raise NotMeasuredError(f"{shown(self._python)} {self._end_of_errors(str(error))}") from error
        if not isinstance(answer, dict):
            raise NotMeasuredError(f"{shown(self._python)} {self._end_of_errors('gave no answer')}")
        if "error" in answer:
            raise NotMeasuredError(f"{shown(self._python)} could not do it ({answer['error']})")
        return answer

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _end_of_errors(self, otherwise: str) -> str:
        """How the process ended, with the last line that it wrote of errors."""
        try:
            status: int | None = self._process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = lines[-1][:200] if lines else otherwise
        return f"answers no more ({said})" if status is None else f"ended with status {status} ({said})"


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process, and wait for it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # it is gone, and what was not sent with it
                pipe.close()
    process.terminate()
    try:
        process.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
