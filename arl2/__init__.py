"""ARL²: attend locally, remember linearly. Hybrid attention with a fixed-size recurrent memory for causal Wan.

Its import makes sure that the project's other packages are not those of another project: `wan` is also the package of
Wan 2.1's own repository, and many projects have a folder `pipelines`.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_FOLDER = Path(__file__).parents[1]
_PACKAGES = {
    "wan": "Wan 2.1 as a causal, block-autoregressive video diffusion transformer",
    "pipelines": "From a prompt to a video file",
}
"""The project's other packages, and how the docstring of each begins."""


def end_on_signals() -> None:
    """Let a signal end a program that still imports its parts, see `wan.utils.signals.end_on_signals`.

    Programs import it from here, so that a foreign package is told before anything of `wan` is imported.
    """
    from wan.utils import signals

    signals.end_on_signals()


def _refuse_namesakes() -> None:
    """Make sure that imports of the project's packages find them.

    Raises:
        ImportError: another package of the name is found first, or was installed over ours.
    """
    for name, docstring in _PACKAGES.items():
        spec = find_spec(name)
        file = None if spec is None or spec.origin is None else Path(spec.origin)
        if file is not None and file.parent.resolve() == (_FOLDER / name).resolve():
            if docstring in file.read_text(encoding="utf-8", errors="replace"):
                continue
            raise ImportError(
                f"another project's {name} was installed over that of arl2, in {file.parent}: give arl2 an environment "
                "of its own, or install it again"
            )
        places = [] if spec is None else [*([] if file is None else [file]), *(spec.submodule_search_locations or ())]
        raise ImportError(
            f"arl2 needs its own package {name}, but Python finds {next(iter(places), 'none')}: take that off "
            f"PYTHONPATH and the working directory, or uninstall it, or put {_FOLDER} first on PYTHONPATH"
        )


_refuse_namesakes()
