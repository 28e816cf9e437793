"""Fetch the public weights: Wan 2.1 (text encoder, VAE, sizes) and the Causal Forcing generators.

    python scripts/download_weights.py                      # Wan 2.1 T2V 1.3B and Causal Forcing, 20 GB
    python scripts/download_weights.py --what wan-diffusers # Wan 2.1 in diffusers' layout instead

An interrupted download resumes. Files that are there already are not fetched again.
"""

import argparse
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from pipelines.cli import exit_on_input_error
from wan.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A public repository of weights.

    Attributes:
        repository: its name on the hub.
        folder: where it goes, below --folder.
        patterns: the files that we need of it.
    """

    repository: str
    folder: str
    patterns: tuple[str, ...]


SOURCES = {
    "wan": Source(
        "Wan-AI/Wan2.1-T2V-1.3B",
        "wan_models/Wan2.1-T2V-1.3B",
        ("config.json", "diffusion_pytorch_model*", "models_t5_*.pth", "Wan2.1_VAE.pth", "google/*", "LICENSE*"),
    ),
    "causal-forcing": Source(
        "zhuhz22/Causal-Forcing",
        "checkpoints",
        ("chunkwise/causal_forcing.pt", "framewise/causal_forcing.pt", "LICENSE*"),
    ),
    "wan-diffusers": Source(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "wan_models/Wan2.1-T2V-1.3B-Diffusers",
        ("model_index.json", "transformer/*", "text_encoder/*", "tokenizer/*", "vae/*", "LICENSE*"),
    ),
}
DEFAULT = ("wan", "causal-forcing")


def bytes_to_fetch(source: Source, target: Path, endpoint: str | None) -> int:
    """Bytes of the files of a source that are not on the disk yet."""
    info = HfApi(endpoint=endpoint).model_info(source.repository, files_metadata=True)
    missing = [
        file
        for file in info.siblings or []
        if any(Path(file.rfilename).match(pattern) for pattern in source.patterns)
        and not (target / file.rfilename).is_file()
    ]
    return sum(file.size or 0 for file in missing)


def fetch(source: Source, folder: Path, endpoint: str | None) -> Path:
    """Fetch one source.

    Raises:
        InputError: the hub cannot be reached, does not have it, or the disk is too small.
    """
    target = folder / source.folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        needed, free = bytes_to_fetch(source, target, endpoint), shutil.disk_usage(target).free
        if needed > free:
            raise InputError(
                f"{source.repository} needs {needed / 1e9:.1f} GB, {target} has {free / 1e9:.1f} GB: free some space"
            )
        snapshot_download(source.repository, local_dir=target, allow_patterns=list(source.patterns), endpoint=endpoint)
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {source.repository}: it may have moved or ask for a login") from error
    except InputError:
        raise
    except Exception as error:  # the hub's HTTP client, and so its errors, changes with the release
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot fetch {source.repository} ({reason}): check network and disk and try again: it resumes"
        ) from error
    return target


@exit_on_input_error
def main() -> int:
    """Parse, fetch, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=[*SOURCES, "all"], nargs="*", default=DEFAULT)
    parser.add_argument("--folder", type=Path, default=Path(), help="below which wan_models/ and checkpoints/ go")
    parser.add_argument("--endpoint", help="another hub than huggingface.co, a mirror for instance")
    arguments = parser.parse_args()
    for name in SOURCES if "all" in arguments.what else arguments.what:
        target = fetch(SOURCES[name], arguments.folder, arguments.endpoint)
        log.info("%s is in %s", SOURCES[name].repository, target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
