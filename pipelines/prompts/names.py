"""File names as people write them: found under any spelling that exists, and shown on one line."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path


def shown(name: str | Path) -> str:
    """A name for a message: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False where the system refuses to say, as for names that are too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def find_file(written: str, folders: Sequence[Path]) -> Path:
    """The file that a list names.

    A name is tried as it is written, without spaces at its ends, and in the other normal form of Unicode, since macOS
    and Linux spell accents differently. Absolute names need no folder.

    Args:
        written: the name in the list.
        folders: where relative names may begin; the first that has the file is taken.

    Returns:
        the path that exists; if none does, the one in the first folder.
    """
    stripped = written.strip()
    spellings = (written, stripped, unicodedata.normalize("NFC", stripped), unicodedata.normalize("NFD", stripped))
    paths = [folder / spelling for spelling in dict.fromkeys(spellings) for folder in folders]
    return next((path for path in paths if is_file(path)), folders[0] / stripped)
