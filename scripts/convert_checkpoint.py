"""Convert transformer weights between formats, strictly.

    # Causal Forcing .pt → diffusers-style folder that HybridWanModel.from_pretrained loads
    python scripts/convert_checkpoint.py causal_forcing.pt models/causal-forcing \\
        --model_folder wan_models/Wan2.1-T2V-1.3B
    # hybrid folder → ARL² .pt under the official names; adapters of the feed-forward folded into their linears
    python scripts/convert_checkpoint.py models/hybrid arl2.pt --merge_ffn_lora
    # a model and its LoRA as one checkpoint, as training and its data take it
    python scripts/convert_checkpoint.py longlive_base.pt longlive.safetensors --size 1.3B --lora lora.pt

The target's ending decides: .pt (Causal Forcing / ARL²), .safetensors (bare names), or a folder (sharded safetensors).
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from pathlib import Path

import torch

from arl2.adapters import base_parameters, fuse, read_loras
from arl2.checkpoint import LoadReport, build_hybrid, holds_hybrid_alone, read_generator, save_generator
from arl2.model import FFNLoRA, HybridWanModel
from pipelines.cli import entry_point
from pipelines.config import HybridConfig
from pipelines.flags import Parser, as_input, as_path
from wan.checkpoints.fields import SIZES
from wan.checkpoints.formats import TransformerWeights, read_transformer, transformer_config
from wan.checkpoints.lora import LoRASource
from wan.checkpoints.pickles import SUFFIXES as PICKLE_SUFFIXES
from wan.config import WAN_SIZES, wan_size
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder, check_writable, no_empty_folder_left, remove_abandoned
from wan.utils.locks import exclusive

WRITTEN = (".pt", ".safetensors")
log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, HybridConfig, aliases={"--config": "--model_folder"})
    add, setting = parser.add_argument, parser.add_setting
    add("source", type=as_input, help="weights of any supported format")
    add("target", type=as_path, help=".pt, .safetensors or a folder that does not exist yet")
    sizes = parser.add_argument_group("model").add_mutually_exclusive_group()
    about = "folder with the transformer's config.json, for a bare weight file; hybrid weights alone are put on its own"
    sizes.add_argument("--model_folder", type=as_input, metavar="PATH", help=about)
    sizes.add_argument("--size", choices=WAN_SIZES, help="sizes of the transformer, for a bare weight file")
    add("--use_ema", action="store_true", help="take generator_ema of a file that has both")
    setting("--hybrid_layers", "layers", "convert to hybrid in these layers, untrained")
    setting("--lora_rank", "lora_rank", "rank of the adapters; by default that of the source")
    alpha = "scale of the adapters times their rank; by default that of the source, or 32 where it does not say"
    setting("--lora_alpha", "lora_alpha", alpha, shows_default=False)
    setting("--ffn_lora_all_layers", "ffn_lora", "adapters on the feed-forward of every block", const=FFNLoRA.ALL)
    loras = "LoRAs to make a part of the weights, each FILE or FILE:SCALE; may be given several times"
    add("--lora", action="collect", nargs="+", default=[], metavar="PATH", help=loras)
    add("--merge_ffn_lora", action="store_true", help="fold feed-forward adapters into their linear layers")
    parser.add_seed("of new parameters")
    return parser.parse_args()


def read(source: Path, model_folder: Path | None, use_ema: bool) -> TransformerWeights:
    """The weights to convert; hybrid ones that lack their base are put on the softmax model of `model_folder`."""
    if not holds_hybrid_alone(source):
        return read_transformer(source, use_ema)
    if model_folder is None:
        raise InputError(f"{source} holds hybrid weights alone: give the folder of its softmax model as --model_folder")
    return read_generator(model_folder, source, use_ema)


def save(model: HybridWanModel, target: Path) -> None:
    """Write a model in the format that the target's ending names; under its name there is a whole one or none."""
    if target.suffix in WRITTEN:
        save_generator(model, target)
        return
    with atomic_folder(target) as temporary:
        model.save_pretrained(temporary)


def require_effect(arguments: argparse.Namespace, model: HybridWanModel, report: LoadReport) -> None:
    """Make sure that flags about adapters and new parameters have some to work on.

    Raises:
        InputError: there are none.
    """
    if arguments.merge_ffn_lora and not model.adapters():
        raise InputError(
            f"--merge_ffn_lora would do nothing: {arguments.source} has no adapters on its feed-forwards; drop it"
        )
    if "seed" in getattr(arguments, "given", {}) and not report.untrained:
        raise InputError(
            "--seed would do nothing: it is of new parameters, and nothing is converted to hybrid; name "
            "--hybrid_layers, or drop it"
        )


@entry_point()
def main() -> int:
    """Parse, read, fit, write; one process at a time writes a target."""
    arguments = parse()
    target: Path = arguments.target
    is_file_s = target.name.lower().endswith((*PICKLE_SUFFIXES, ".safetensors", ".json"))
    if is_file_s and target.suffix not in WRITTEN:
        raise InputError(
            f"{target}: weights are written as {' or '.join(WRITTEN)}, spelled so, or into a folder of another ending: "
            "choose one"
        )
    with no_empty_folder_left(target.parent):
        check_writable(target.parent)
        with exclusive(target.with_name(f".{target.name}.lock"), str(target)):
            remove_abandoned(target)
            if target.exists():
                raise InputError(f"{target} exists: choose another target or remove it")
            convert(arguments)
    return 0


def convert(arguments: argparse.Namespace) -> None:
    """Read, fit, write.

    Raises:
        InputError: the source is missing or damaged, or its sizes are not known, or contradict the flags.
    """
    weights = read(arguments.source, arguments.model_folder, arguments.use_ema)
    loras = read_loras(weights.state, [LoRASource.from_text(text) for text in arguments.lora])
    if arguments.model_folder is not None:
        config = transformer_config(arguments.model_folder)
    elif arguments.size is not None:
        config = dict(wan_size(arguments.size))
    elif weights.config:
        config = {}
    else:
        raise InputError(f"{arguments.source} does not state the model's sizes: give --model_folder or --size")
    wanted = HybridConfig(**arguments.flags).settings()
    for name in sorted(config.keys() & weights.config.keys() & SIZES.keys()):
        if config[name] != weights.config[name]:
            flag = "--model_folder" if arguments.model_folder else "--size"
            raise InputError(
                f"{arguments.source} says {name} {weights.config[name]}, {flag} says {name} {config[name]}: drop {flag}"
            )
    # Every weight keeps its type: training exports hold what was trained in float32, and the frozen rest as it was.
    model, report = build_hybrid(weights, config, wanted, dtype=None, device=torch.device("cpu"), seed=arguments.seed)
    require_effect(arguments, model, report)
    fuse(base_parameters(model), loras)
    if arguments.merge_ffn_lora:
        model.merge_ffn_lora()
    save(model, arguments.target)
    memory = f", trained with {model.trained_memory}" if model.trained_memory else ""
    log.info("wrote %s: %s%s", arguments.target, model.hybrid, memory)


if __name__ == "__main__":
    raise SystemExit(main())
