"""Files that ship beside the code: configs, prompts, the toy world's models, entry points.

In a checkout they lie where the repository has them. A wheel holds them in a folder of this package, under the same
relative paths; setup.py puts them there.
"""

import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[2]
"""The folder that holds the packages: the checkout, or site-packages."""
IN_WHEEL = Path(__file__).with_name("checkout")
ROOT = IN_WHEEL if IN_WHEEL.is_dir() else SOURCES
"""The folder that holds what ships, under the paths of the repository."""
FOLDERS = (Path("configs"), Path("prompts"), Path("models/toyworld"))
"""What a command line may name although it is not below the working directory."""


def find_shipped(path: Path) -> Path:
    """A file or folder to read: the path itself, or the shipped file of that name if there is nothing at the path.

    Only relative paths below `FOLDERS` are looked up so. What lies below the working directory goes before, and the log
    names a shipped file that is taken.
    """
    if path.is_absolute() or ".." in path.parts or not any(path.is_relative_to(folder) for folder in FOLDERS):
        return path
    shipped = ROOT / path
    if path.exists() or not shipped.exists():
        return path
    _say_once(path)
    return shipped


@cache
def _say_once(path: Path) -> None:
    log.info("%s is not here: taking the one that comes with arl2", path)
