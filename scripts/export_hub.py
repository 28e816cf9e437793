"""Write a folder that plain diffusers loads with one call, with a model card, to be uploaded to the hub.

    python scripts/export_hub.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --checkpoint_path runs/stage2/export_ema --output_folder hub/mine --records output/mine

    DiffusionPipeline.from_pretrained("hub/mine", trust_remote_code=True)   # where this package is installed
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
from pathlib import Path

import torch

from pipelines.cli import entry_point
from pipelines.config import InferenceConfig, MemoryConfig
from pipelines.dtypes import DTYPES
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import check_config
from pipelines.generation.hub.card import CardFacts, model_card, read_records
from pipelines.generation.hub.loaded import HubVideoPipeline
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.settings import load_config
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder, check_writable, write_text
from wan.vae.wan_vae import temporal_stride

log = logging.getLogger(__name__)

BASE_MODEL = "Wan-AI/Wan2.1-T2V-1.3B"


def new_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__, InferenceConfig, reads_config=True)
    add = parser.add_argument
    add("--output_folder", type=as_path, required=True, metavar="PATH", help="where the folder goes; not there yet")
    weights = "transformer weights (.pt, .safetensors or a folder); by default the config's"
    parser.add_setting("--checkpoint_path", "checkpoint_path", weights)
    add("--use_ema", action="store_true", help="take generator_ema of the checkpoint")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    add("--name", help="title of the model card; by default the folder's name")
    add("--licence", default="apache-2.0", help="identifier of the licence on the hub (default apache-2.0)")
    base = f"repository that the model was made from (default {BASE_MODEL})"
    add("--base_model", default=BASE_MODEL, help=base)
    add("--recipe", type=as_path, metavar="FILE", help="Markdown that says how the model was made")
    add("--records", type=as_path, metavar="PATH", help="a folder with records of inference.py, for numbers")
    return parser


@entry_point()
def main() -> int:
    """Check, load, write."""
    arguments = new_parser().parse_args()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    check_config(config)
    target: Path = arguments.output_folder
    if target.exists():
        raise InputError(f"{target} is there already: choose another --output_folder, or delete it")
    check_writable(target.parent)
    recipe = _text_of(arguments.recipe)
    records = [] if arguments.records is None else read_records(arguments.records)
    pipeline = HubVideoPipeline.from_pretrained(
        config.model_folder,
        checkpoint_path=config.checkpoint_path,
        use_ema=arguments.use_ema,
        hybrid=config.hybrid.settings(),
        lora=config.lora_sources(),
        dtype=DTYPES[arguments.dtype],
        device=torch.device("cpu"),
        height=config.height,
        width=config.width,
        num_frames=(config.num_output_frames - 1) * temporal_stride(Path(config.model_folder)) + 1,
        **config.sampling(),
    )
    memory = _memory_of_calls(config, pipeline)
    name = arguments.name or target.resolve().name
    facts = CardFacts(name, arguments.licence, arguments.base_model, recipe, memory, config.caveat)
    with atomic_folder(target) as temporary:
        pipeline.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(pipeline, facts, records))
    log.info("written to %s: upload it with `hf upload OWNER/NAME %s`", target, target)
    return 0


def _memory_of_calls(config: InferenceConfig, pipeline: CausalVideoPipeline) -> MemoryConfig | None:
    """The config's memory if a call of the pipeline takes another by default, with a warning; None otherwise."""
    if config.caveat is not None:
        log.warning("%s", config.caveat)
    trained = pipeline.transformer.trained_memory
    if config.memory.resolved(trained).identity() == MemoryConfig().resolved(trained).identity():
        return None
    log.warning(
        "the folder does not store the memory of kind %s: give it with every call, as the model card says",
        config.memory.kind.value,
    )
    return config.memory


def _text_of(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: give a Markdown file") from error


if __name__ == "__main__":
    raise SystemExit(main())
