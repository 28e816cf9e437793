"""Write a model folder with random weights, of real or toy size: to measure speed and memory without the real ones.

python scripts/profiling/make_random_model.py --size 1.3B --output_folder wan_models/random-1.3B   # 20 GB, as released
python scripts/profiling/make_random_model.py --size toy --layout diffusers --output_folder models/random-toy
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
from pathlib import Path

from arl2.model import HybridSettings
from pipelines.cli import choose_device, entry_point
from pipelines.config import HybridConfig
from pipelines.dtypes import DTYPES
from pipelines.flags import Parser, as_path
from pipelines.generation.random_model import random_pipeline, save_native_folder
from wan.config import WAN_SIZES
from wan.text import TOY_TEXT, UMT5_XXL
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder, check_writable
from wan.vae.wan_vae import TOY_VAE, WAN21_VAE

log = logging.getLogger(__name__)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model in either layout, or nothing."""
    if not folder.is_dir():
        return False
    return any((folder / name).is_file() for name in ("model_index.json", "config.json")) or not any(folder.iterdir())


@entry_point()
def main() -> int:
    """Parse, draw, save."""
    parser = Parser(__doc__, HybridConfig, aliases={"--folder": "--output_folder"})
    parser.add_argument("--size", choices=WAN_SIZES, required=True, help="toy brings a toy VAE and text encoder")
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the model goes")
    parser.add_argument(
        "--layout", choices=("native", "diffusers"), default="native", help="of the folder (default native)"
    )
    parser.add_setting("--hybrid_layers", "layers", "layers with hybrid attention; only in the diffusers layout")
    parser.add_argument(
        "--text_encoder", choices=("real", "toy"), default="real", help="real (the default) is UMT5-XXL, 11 GB"
    )
    parser.add_seed()
    parser.add_argument(
        "--device", help="where weights are drawn: cpu, cuda or cuda:N; by default the GPU if there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    arguments = parser.parse_args()
    toy = arguments.size == "toy"
    released = not (arguments.hybrid_layers or toy or arguments.text_encoder == "toy")
    if arguments.layout == "native" and not released:
        raise InputError("the native layout holds softmax models of released sizes: give --layout diffusers")
    check_writable(arguments.output_folder.parent)
    if arguments.output_folder.exists() and not is_model(arguments.output_folder):
        raise InputError(
            f"{arguments.output_folder} is there and holds no model that could be replaced: choose another"
        )
    pipeline = random_pipeline(
        arguments.size,
        HybridSettings(tuple(arguments.hybrid_layers)),
        vae_config=TOY_VAE if toy else WAN21_VAE,
        text_config=TOY_TEXT if toy or arguments.text_encoder == "toy" else UMT5_XXL,
        seed=arguments.seed,
        device=choose_device(arguments.device),
        dtype=DTYPES[arguments.dtype],
    )
    with atomic_folder(arguments.output_folder) as temporary:
        if arguments.layout == "native":
            save_native_folder(pipeline, temporary)
        else:
            pipeline.save_pretrained(temporary)
    log.info("random %s model written to %s", arguments.size, arguments.output_folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
