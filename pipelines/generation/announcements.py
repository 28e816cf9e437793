"""What the runs in one output folder are making, so that none begins what another makes with other settings.

    .run-<id>.lock   held as long as the run lasts
    .run-<id>.json   settings, and by name its videos with what each has of its own

Videos have locks of their own, but a run holds one at a time: two runs of different settings would make a mix of videos
that neither of them could finish.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from wan.utils.files import read_json, remove, remove_all_abandoned, write_json
from wan.utils.locks import LockedError, exclusive
from wan.utils.settings import plain, require_same_settings

CURE = "wait until it has ended, or give another --output_folder"
_BEGINNING = ".run-"
_TURN = ".runs.lock"


@contextmanager
def announced(folder: Path, settings: Mapping[str, Any], videos: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Say inside the context what a run makes.

    Args:
        folder: where its videos go.
        settings: what all of them are made with.
        videos: by name, what each has of its own, such as its image.

    Raises:
        InputError: another run makes one of them with other settings: who, and which.
    """
    lock = folder / f"{_BEGINNING}{uuid4().hex}.lock"
    page = lock.with_suffix(".json")
    try:
        with ExitStack() as held:
            with _turn(folder):
                for other, holder in _others(folder):
                    for name in sorted(videos.keys() & other["videos"].keys()):
                        before, now = other["settings"] | other["videos"][name], plain({**settings, **videos[name]})
                        require_same_settings(before, now, f"{folder / name}.mp4 is to be made by {holder}", CURE)
                held.enter_context(exclusive(lock, str(lock)))
                held.callback(remove, page)
                write_json(page, plain({"settings": settings, "videos": videos}))
            yield
    finally:
        with _turn(folder):
            _others(folder)  # of runs that were killed nothing is left


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait for one's turn to look at the announcements, which takes a moment."""
    with exclusive(folder / _TURN, str(folder), on_wait=lambda holder: None):
        yield


def _others(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """The announcements of runs that last, with who they are; those of runs that were killed are removed."""
    found = []
    remove_all_abandoned(folder)
    for lock in sorted(folder.glob(f"{_BEGINNING}*.lock")):
        page = lock.with_suffix(".json")
        try:
            with exclusive(lock, str(lock)):
                remove(page)
        except LockedError as error:
            if page.exists():
                found.append((read_json(page), error.holder))
    return found
