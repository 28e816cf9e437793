"""The folder of a model or of a LoRA: one of this machine, or a repository of the hub in huggingface_hub's cache."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from wan.checkpoints.identify import LORA_FILES
from wan.checkpoints.peft import CONFIG_FILE
from wan.utils.errors import InputError

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
SETTINGS = ("model_index.json", "config.json", "*/config.json")
"""Files with the sizes of all parts, whichever of them are loaded."""
PARTS = {
    "transformer": ("diffusion_pytorch_model*", "transformer/*.json", "transformer/*.safetensors"),
    "vae": ("Wan2.1_VAE.pth", "vae/*.json", "vae/*.safetensors"),
    "text_encoder": ("models_t5_*.pth", "text_encoder/*.json", "text_encoder/*.safetensors"),
    "tokenizer": ("google/umt5-xxl/*", "tokenizer/*"),
}
"""Files of every part, in Wan's layout and in diffusers'."""


class HubOptions(NamedTuple):
    """Arguments of `huggingface_hub.snapshot_download`, under their names there."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


def model_folder(name: str | Path, options: HubOptions, without: Mapping[str, bool]) -> Path:
    """The folder of a model, fetched from the hub if the name is a repository's and no folder is there.

    Args:
        name: a folder, or "owner/name".
        without: parts that are not fetched, by name.

    Raises:
        InputError: neither a folder nor a repository that can be had.
    """
    folder = Path(name)
    if folder.exists() or isinstance(name, Path) or not _REPOSITORY.fullmatch(name):
        return folder
    patterns = [*SETTINGS, *(file for part, files in PARTS.items() if not without.get(part) for file in files)]
    return _fetched(name, patterns, options, "model")


def lora_folder(name: str | Path, weight_name: str | None, options: HubOptions) -> Path:
    """The file or folder of a LoRA, fetched from the hub as `model_folder` does.

    Args:
        name: a file, a folder, or "owner/name".
        weight_name: the file that is meant, without which those with the names of peft and diffusers are fetched.

    Raises:
        InputError: neither here nor in a repository that can be had.
    """
    path = Path(name)
    if path.exists() or isinstance(name, Path) or not _REPOSITORY.fullmatch(name):
        return path
    return _fetched(name, [*(LORA_FILES if weight_name is None else (weight_name,)), CONFIG_FILE], options, "LoRA")


def _fetched(name: str, patterns: list[str], options: HubOptions, what: str) -> Path:
    """The folder of a repository in the cache, with the files of some patterns.

    Raises:
        InputError: it cannot be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options._asdict()))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, GatedRepoError) as error:
        at = "" if options.revision is None else f" at revision {options.revision}"
        raise InputError(
            f"no folder {name} here, and the hub shows no repository {name}{at}: check the name, or log in "
            "(hf auth login) for a private or gated one"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"no folder {name} here, it is not whole in the hub's cache, and the hub was not reached: give the folder "
            f"of a {what}, or download it while you are online"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot fetch {name} from the hub ({reason}): try again, or give a folder") from error
