"""What ships of the toy world: weights that are what the documents say they are."""

from pathlib import Path

import torch

from arl2.toyworld.vae_quality import vae_quality
from wan.vae import load_vae

BUNDLE = Path(__file__).parent.parent / "models" / "toyworld"
MOST_BYTES = 20e6


def test_it_is_small_and_holds_nothing_that_is_unpickled() -> None:
    files = [file for file in BUNDLE.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json"}
    assert 7e6 < sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_the_vae_keeps_what_the_probe_reads() -> None:
    quality = vae_quality(load_vae(BUNDLE / "vae"), torch.device("cpu"), videos=2, batch=2)
    assert quality["psnr"] > 30 and quality["psnr_objects"] > 24
    assert quality["both"] == quality["both_truth"] == 1.0
