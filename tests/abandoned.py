"""What killed processes leave behind."""

import subprocess
import sys
from pathlib import Path

from wan.utils.files import host_name


def dead_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def abandoned(path: Path) -> Path:
    """The temporary path of a process of this host that was killed while it wrote `path`."""
    return path.with_name(f".{path.name}.{host_name()}-{dead_process()}-0.part")
