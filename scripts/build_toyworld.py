"""Build the toy world's models, step by step; a step that is done is skipped, so the script can be started again.

    python scripts/build_toyworld.py --work runs/toyworld            # every step that exists
    python scripts/build_toyworld.py --work runs/toyworld --step vae

Each step leaves its weights and a JSON with its quality, settings, seconds, card and versions in the work folder.
"""

import argparse
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from arl2.toyworld.train_vae import VAETraining, train_vae
from arl2.toyworld.vae_quality import vae_quality
from pipelines.cli import choose_device, exit_on_input_error
from wan.checkpoint import atomic_path
from wan.errors import InputError

log = logging.getLogger(__name__)


def build_vae(work: Path, device: torch.device, steps: int | None) -> dict[str, Any]:
    """Train the VAE, measure it, and save it in half precision."""
    settings = VAETraining() if steps is None else replace(VAETraining(), steps=steps)
    start = time.perf_counter()

    def report(step: int, loss: float, decibels: float) -> None:
        log.info("step %d, %.0f s: loss %.4f, %.1f dB", step, time.perf_counter() - start, loss, decibels)

    vae = train_vae(settings, device, report)
    seconds = time.perf_counter() - start
    partial = work / ".vae.part"
    shutil.rmtree(partial, ignore_errors=True)
    torch.nn.Module.half(vae.model).save_pretrained(partial)
    partial.rename(work / "vae")
    quality = vae_quality(vae.to(device, torch.float32), device)
    return {"settings": asdict(settings), "seconds": seconds, "quality": quality}


STEPS: dict[str, Callable[[Path, torch.device, int | None], dict[str, Any]]] = {"vae": build_vae}


@exit_on_input_error
def main() -> int:
    """Parse, and run the steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the steps' results")
    parser.add_argument("--step", choices=STEPS, help="only this one, again if it is done")
    parser.add_argument("--steps", type=int, help="optimiser steps in the place of the default, with --step")
    parser.add_argument("--device", help="cuda or cpu")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.step is None:
        raise InputError("--steps needs --step: say of which one")
    device = choose_device(arguments.device)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, build in STEPS.items():
        page = arguments.work / f"{name}.json"
        if arguments.step not in (None, name) or (arguments.step is None and page.is_file()):
            continue
        shutil.rmtree(arguments.work / name, ignore_errors=True)
        result = build(arguments.work, device, arguments.steps)
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        result |= {"device": card, "torch": torch.__version__, "python": platform.python_version()}
        with atomic_path(page) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        log.info("%s: %s", name, result["quality"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
