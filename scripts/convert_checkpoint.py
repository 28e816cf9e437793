"""Convert transformer weights between formats, strictly.

    # Causal Forcing .pt → diffusers-style folder that HybridWanModel.from_pretrained loads
    python scripts/convert_checkpoint.py causal_forcing.pt models/causal-forcing --config wan_models/Wan2.1-T2V-1.3B
    # hybrid folder → ARL² .pt under the official names; adapters of the feed-forward folded into their linears
    python scripts/convert_checkpoint.py models/hybrid arl2.pt --merge_ffn_lora

The target's ending decides: .pt (Causal Forcing / ARL²), .safetensors (bare names), or a folder (sharded safetensors).
"""

import argparse
import logging
from pathlib import Path

import torch

from arl2.checkpoint import build_hybrid, save_generator
from arl2.model import DEFAULT_LORA_ALPHA, FFNLoRA, HybridSettings, HybridWanModel
from pipelines.cli import exit_on_input_error
from wan.checkpoints.fields import SIZES
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.config import WAN_SIZES, wan_size
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="weights of any supported format")
    add("target", type=Path, help=".pt, .safetensors or a folder that does not exist yet")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--config", type=Path, help="folder with the transformer's config.json, for a bare weight file")
    sizes.add_argument("--size", choices=WAN_SIZES, help="sizes of the transformer, for a bare weight file")
    add("--use_ema", action="store_true", help="take generator_ema of a file that has both")
    add("--hybrid_layers", type=int, nargs="*", default=[], help="convert to hybrid in these layers, untrained")
    add("--lora_rank", type=int)
    add("--lora_alpha", type=float, default=DEFAULT_LORA_ALPHA, help="of adapters; weights do not store it")
    add("--ffn_lora_all_layers", action="store_true")
    add("--merge_ffn_lora", action="store_true", help="fold feed-forward adapters into their linear layers")
    add("--seed", type=int, default=0, help="of new parameters")
    return parser.parse_args()


def save(model: HybridWanModel, target: Path) -> None:
    """Write a model in the format that the target's ending names; under its name there is a whole one or none."""
    if target.suffix in (".pt", ".safetensors"):
        save_generator(model, target)
        return
    with atomic_folder(target) as temporary:
        model.save_pretrained(temporary)


@exit_on_input_error
def main() -> int:
    """Parse, read, fit, write."""
    arguments = parse()
    if arguments.target.exists():
        raise InputError(f"{arguments.target} exists: choose another target or remove it")
    weights = read_transformer(arguments.source, arguments.use_ema)
    if arguments.config is not None:
        config = transformer_config(arguments.config)
    elif arguments.size is not None:
        config = dict(wan_size(arguments.size))
    elif weights.config:
        config = {}
    else:
        raise InputError(f"{arguments.source} does not state the model's sizes: give --config or --size")
    wanted = HybridSettings(
        tuple(arguments.hybrid_layers),
        arguments.lora_rank,
        arguments.lora_alpha,
        FFNLoRA.ALL if arguments.ffn_lora_all_layers else FFNLoRA.HYBRID,
    )
    for name in sorted(config.keys() & weights.config.keys() & SIZES.keys()):
        if config[name] != weights.config[name]:
            flag = "--config" if arguments.config else "--size"
            raise InputError(
                f"{arguments.source} says {name} {weights.config[name]}, {flag} says {name} {config[name]}: drop {flag}"
            )
    # Every weight keeps its type: training exports hold what was trained in float32, and the frozen rest as it was.
    model, report = build_hybrid(weights, config, wanted, dtype=None, device=torch.device("cpu"), seed=arguments.seed)
    if arguments.merge_ffn_lora:
        model.merge_ffn_lora()
    save(model, arguments.target)
    memory = f", trained with {model.trained_memory}" if model.trained_memory else ""
    log.info("wrote %s: %s%s", arguments.target, report.settings, memory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
