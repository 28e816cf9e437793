"""Reading `.pt` files without running code from them.

PyTorch's restricted unpickler builds tensors and plain containers. Training scripts put other data beside them: their
arguments, NumPy scalars, paths, dates. Names of such harmless data are mapped to `Opaque`, which takes any content and
keeps nothing, so that the tensors can be read and no class of the file is ever called. Every other name is refused.
"""

import pickle
import re
import warnings
import zlib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch

from wan.checkpoints.tensors import printable
from wan.utils.errors import CheckpointError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|_codecs\.encode|copyreg\._reconstructor"
    r"|(builtins|__builtin__)\.(object|list|dict|set|frozenset|tuple|slice|range|complex|bytearray|bytes|int|float|str|bool)"
    r"|numpy\.(dtype|ndarray|bool_?|number|generic|u?int\d+|float\d+|complex\d+|str_|bytes_)|numpy\.dtypes\.\w+"
    r"|numpy\.(core|_core)\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.random\.[\w.]+|pathlib\.(\w+\.)?(Pure)?(Posix|Windows)?Path|datetime\.\w+|decimal\.Decimal"
    r"|fractions\.Fraction|uuid\.UUID|typing\.\w+|collections\.(deque|defaultdict|Counter|OrderedDict)"
    r"|omegaconf\.([a-z_]+\.)+\w+"
)
"""Names in a pickle that stand for plain data; compared whole."""
_UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)")
# What the unpickler raises on damaged bytes, besides its own error: it takes them for what they say.
_DAMAGED = (
    *(EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(OverflowError, MemoryError, OSError, BadZipFile, LookupError),
)


NO_PICKLE = "no pickle of tensors"


class Opaque:
    """Data of a class that we do not build; takes any content, keeps none. Its subclasses have the classes' names."""

    def __new__(cls, *content: Any, **named: Any) -> "Opaque":
        return super().__new__(cls)

    def __init__(self, *content: Any, **named: Any) -> None:
        pass

    def __setstate__(self, content: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=16)
def _require_intact(path: Path, size: int, changed_ns: int) -> None:
    """Compare the content with the checksums inside, which `torch.load` does not; once for a file of a size and time.

    Raises:
        CheckpointError: a part is damaged.
    """
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except (BadZipFile, OSError, ValueError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not complete ({error}): download it again") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong; download it again")


def read_pickle(path: Path) -> dict[object, Any]:
    """Read the content of a `.pt` file: names to tensors, numbers, texts, containers of these, and `Opaque` data.

    Raises:
        CheckpointError: damaged, no dictionary, or holding classes and functions that are no plain data.
    """
    zipped = is_zipfile(path)
    if zipped:
        facts = path.stat()
        _require_intact(path, facts.st_size, facts.st_mtime_ns)
    stand_ins = set(_foreign_names(path)) if zipped else set[str]()
    while True:
        harmful = sorted(name for name in stand_ins if not HARMLESS.fullmatch(name))
        if harmful:
            raise _more_than_tensors(path, harmful)
        try:
            loaded = _load(path, zipped, stand_ins)
            break
        except pickle.UnpicklingError as error:
            found = set(_UNSUPPORTED.findall(str(error))) - stand_ins
            if found:  # a file of the older format: its names show one by one
                stand_ins |= found
                continue
            if stand_ins:
                raise CheckpointError(
                    f"{path} holds containers that are not read safely ({_some(stand_ins)}): ask for the weights as "
                    ".safetensors, or as a .pt that holds tensors in plain dictionaries"
                ) from error
            raise damaged(path, NO_PICKLE) from error
        except RecursionError as error:
            raise CheckpointError(f"{path} nests containers too deep: it is damaged; download it again") from error
        except RuntimeError as error:
            raise damaged(path, str(error)) from error
        except _DAMAGED as error:
            raise damaged(path, NO_PICKLE) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a value of type {type(loaded).__name__}, not a dictionary of tensors: save it as one"
        )
    return loaded


def _load(path: Path, zipped: bool, stand_ins: set[str]) -> Any:
    named: list[Any] = [(type(name, (Opaque,), {}), name) for name in stand_ins]
    with warnings.catch_warnings(), torch.serialization.safe_globals(named):
        warnings.simplefilter("ignore")  # about the versions of pickles, in several lines
        # Only the current (zip) format can be mapped instead of read; released files of the older one exist.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _foreign_names(path: Path) -> list[str]:
    """Names of classes and functions in a zipped pickle that the restricted unpickler does not know."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except RuntimeError as error:
        raise damaged(path, str(error)) from error
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        raise damaged(path, NO_PICKLE) from error


def _more_than_tensors(path: Path, names: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors and plain data ({_some(names)}), and reading that could run code: ask for the "
        "weights as .safetensors, or as a .pt that holds tensors alone"
    )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error of a weight file that cannot be read, with the beginning of the reader's own reason."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reason).strip()
    first = re.split(r"[\n(]|\. |: ", plain)[0].strip() or "no reason is known"
    return CheckpointError(
        f"cannot read {path} as a weight file ({printable(first)}): it is damaged or incomplete; download it again"
    )
