"""Fetch the public weights: Wan 2.1 (text encoder, VAE, sizes) and the Causal Forcing generators.

    python scripts/download_weights.py                      # Wan 2.1 T2V 1.3B and Causal Forcing, 30 GB
    python scripts/download_weights.py --what wan-diffusers # Wan 2.1 in diffusers' layout instead
    python scripts/download_weights.py --what wan longlive  # what configs/presets/longlive.yaml names

A connection that drops is taken up where it broke. A run that was stopped can be started again: whole files are kept,
the one it was at begins anew.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console

from pipelines.cli import entry_point
from pipelines.flags import Parser, as_path
from wan.utils.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A public repository of weights.

    Attributes:
        repository: its name on the hub.
        folder: where it goes, below --output_folder.
        patterns: the files that we need of it.
    """

    repository: str
    folder: str
    patterns: tuple[str, ...]


WAN_PARTS = ("config.json", "models_t5_*.pth", "Wan2.1_VAE.pth", "google/*")
"""Files of a Wan 2.1 release beside its transformer."""


def preset(name: str, repository: str, *files: str) -> dict[str, Source]:
    """The weights of configs/presets/NAME.yaml."""
    return {name: Source(repository, f"checkpoints/{name}", files)}


SOURCES = {
    "wan": Source(
        "Wan-AI/Wan2.1-T2V-1.3B",
        "wan_models/Wan2.1-T2V-1.3B",
        ("diffusion_pytorch_model*", *WAN_PARTS),
    ),
    # Without its transformer, in whose place that of a preset goes.
    "wan-14b": Source("Wan-AI/Wan2.1-T2V-14B", "wan_models/Wan2.1-T2V-14B", WAN_PARTS),
    "causal-forcing": Source(
        "zhuhz22/Causal-Forcing",
        "checkpoints",
        ("chunkwise/causal_forcing.pt", "framewise/causal_forcing.pt"),
    ),
    "wan-diffusers": Source(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "wan_models/Wan2.1-T2V-1.3B-Diffusers",
        ("model_index.json", "transformer/*", "text_encoder/*", "tokenizer/*", "vae/*"),
    ),
    **preset("self_forcing", "gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"),
    **preset("causvid", "tianweiy/CausVid", "autoregressive_checkpoint/model.pt"),
    **preset("causvid_14b", "lightx2v/Wan2.1-T2V-14B-CausVid", "causvid_model.pt"),
    **preset("causal_forcing_1step", "zhuhz22/Causal-Forcing", "causal-forcing++/framewise-1step.pt"),
    **preset("causal_forcing_2step", "zhuhz22/Causal-Forcing", "causal-forcing++/framewise-2step.pt"),
    **preset("longlive", "Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", "models/lora.pt"),
    **preset("reward_forcing", "JaydenLu666/Reward-Forcing-T2V-1.3B", "rewardforcing.pt"),
    **preset("krea_14b", "krea/krea-realtime-video", "krea-realtime-video-14b.safetensors"),
    **preset("streamdiffusionv2", "jerryfeng/StreamDiffusionV2", "wan_causal_dmd_v2v/model.pt"),
}
"""What --what takes, and where it comes from: the one table of it."""
LICENCE = "LICENSE*"  # not every source has one
DEFAULT = ("wan", "causal-forcing")


def needed_files(source: Source, endpoint: str | None) -> dict[str, int]:
    """Names and bytes of the files that a source has for us.

    Raises:
        InputError: it has none of them.
    """
    info = HfApi(endpoint=endpoint).model_info(source.repository, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    gone = [pattern for pattern in source.patterns if not any(filter_repo_objects(sizes, allow_patterns=pattern))]
    if len(gone) == len(source.patterns):
        raise InputError(f"{source.repository} has no {' nor '.join(gone)}: look there for what replaced them")
    if gone:
        log.warning("%s has no %s: look there for what replaced it", source.repository, " nor ".join(gone))
    return {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=[*source.patterns, LICENCE])}


def missing_files(files: Mapping[str, int], target: Path) -> dict[str, int]:
    """Those of `files` that are not whole in the folder `target`."""
    return {
        name: size
        for name, size in files.items()
        if not (target / name).is_file() or (target / name).stat().st_size != size
    }


def fetch(source: Source, folder: Path, endpoint: str | None) -> Path:
    """Fetch one source.

    Raises:
        InputError: the hub cannot be reached, does not have it, or the disk is too small.
    """
    target = folder / source.folder
    try:
        files = needed_files(source, endpoint)
        target.mkdir(parents=True, exist_ok=True)
        needed, free = sum(missing_files(files, target).values()), shutil.disk_usage(target).free
        if needed > free:
            raise InputError(
                f"{source.repository} needs {needed / 1e9:.1f} GB, {target} has {free / 1e9:.1f} GB: free some space"
            )
        snapshot_download(source.repository, local_dir=target, allow_patterns=list(files), endpoint=endpoint)
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {source.repository}: it may have moved or ask for a login") from error
    except InputError:
        raise
    except Exception as error:  # the hub's HTTP client, and so its errors, changes with the release
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot fetch {source.repository} ({reason}): check network and disk and try again: whole files are kept"
        ) from error
    # Without a network, snapshot_download is content with a folder that has something in it.
    if missing := missing_files(files, target):
        raise InputError(f"{target} lacks {', '.join(missing)}: check the network and try again: whole files are kept")
    return target


@entry_point()
def main() -> int:
    """Parse, fetch, report."""
    parser = Parser(__doc__, aliases={"--folder": "--output_folder"})
    about = f"which weights (default {' '.join(DEFAULT)})"
    parser.add_argument("--what", choices=[*SOURCES, "all"], nargs="+", default=DEFAULT, help=about)
    below = "below which wan_models/ and checkpoints/ go; by default here"
    parser.add_argument("--output_folder", type=as_path, default=Path(), metavar="PATH", help=below)
    parser.add_argument("--endpoint", help="another hub, a mirror for instance (default: $HF_ENDPOINT)")
    arguments = parser.parse_args()
    for client in ("httpx", "httpx2"):  # by release of huggingface_hub; they log every request
        logging.getLogger(client).setLevel(logging.WARNING)
    for name in SOURCES if "all" in arguments.what else arguments.what:
        target = fetch(SOURCES[name], arguments.output_folder, arguments.endpoint)
        Console(soft_wrap=True, highlight=False).print(f"{SOURCES[name].repository} is in {target}", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
