"""Everything in a row on a CPU: data → stage 1 → layer selection → stage 2 → video, against golden loss curves.

`python tests/pipelines/test_smoke.py` writes the curves anew, after a change that is meant to change them.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paths import GOLDEN_TRAINING, ROOT
from training_world import losses

from arl2.distillation.data import LatentDataset
from pipelines.generation.random_model import random_pipeline
from pipelines.media.video import read_video
from wan.vae.wan_vae import TOY_VAE

GOLDEN = GOLDEN_TRAINING / "smoke.json"
RELATIVE = 1e-3
"""Between PyTorch's kernels with and without vector instructions losses differ by at most 1.5e-5 and gradients by 1e-4,
in float32 (`ATEN_CPU_CAPABILITY=default` against AVX2); most of it comes from latents, which are stored in bfloat16."""
PROMPTS = "a red shape rolls\na blue shape\nred rolls\nblue rolls\n"
INFERENCE = "model_folder: {root}/model\nheight: 32\nwidth: 48\nnum_output_frames: 9\n"
TRAINING = """
model_folder: {root}/model
data: [{root}/data]
run_folder: {root}/stage{stage}
steps: 10
batch: 2
save_every: 5
report_every: 5
tracker: none
device: cpu
optimizer: {{lr: {lr}, warmup_steps: 2}}
"""
STAGE2 = """
init_from: {root}/stage1
layers_file: {root}/layers.yaml
share: 50
lora_rank: 4
checkpointing: true
ema_decay: 0.9
"""


def call(script: str, *flags: object) -> None:
    """Run an entry point of the project."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), str(ROOT), *sys.path])
        assert import_module(script).main() == 0


def run_everything(root: Path) -> dict[str, Any]:
    """Go from random weights to a hybrid model's video; returns what the golden file holds."""
    torch.set_num_threads(1)
    random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4}).save_pretrained(root / "model")
    (root / "prompts.txt").write_text(PROMPTS)
    (root / "inference.yaml").write_text(INFERENCE.format(root=root))
    (root / "stage1.yaml").write_text(TRAINING.format(root=root, stage=1, lr=0.01))
    (root / "stage2.yaml").write_text((TRAINING + STAGE2).format(root=root, stage=2, lr=0.002))
    generation = ("--config", root / "inference.yaml", "--device", "cpu")
    call("generate_latents", *generation, "--data_path", root / "prompts.txt", "--folder", root / "data")
    call("train_stage1", "--config", root / "stage1.yaml")
    export = ("--checkpoint_path", root / "stage1" / "export")
    selection = ("--method", "replacement", "--data_path", root / "prompts.txt", "--videos", 2, "--batch", 2)
    call("select_layers", *generation, *export, *selection, "--yaml", root / "layers.yaml")
    call("train_stage2", "--config", root / "stage2.yaml")
    export = ("--checkpoint_path", root / "stage2" / "export_ema", "--output_folder", root / "videos")
    call("inference", "--config_path", root / "inference.yaml", "--device", "cpu", *export, "--prompt", "a red shape")
    return {
        "latents_rms": [LatentDataset([root / "data"])[i][0].float().square().mean().sqrt().item() for i in range(4)],
        "layers": yaml.safe_load((root / "layers.yaml").read_text())["50"],
        "stage1": curve(root / "stage1"),
        "stage2": curve(root / "stage2"),
    }


def curve(run_folder: Path) -> dict[str, Sequence[float]]:
    """Loss and gradient of every step of a run."""
    lines = losses(run_folder)
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


def test_everything_in_a_row_learns_as_it_did(tmp_path: Path) -> None:
    page, golden = run_everything(tmp_path), json.loads(GOLDEN.read_text())
    frames = read_video(next((tmp_path / "videos").glob("*.mp4")))
    assert frames.shape == (33, 32, 48, 3)
    assert page["layers"] == golden["layers"]
    assert page["latents_rms"] == pytest.approx(golden["latents_rms"], rel=RELATIVE)
    for stage in ("stage1", "stage2"):
        for name in ("loss", "grad_norm"):
            assert page[stage][name] == pytest.approx(golden[stage][name], rel=RELATIVE), (stage, name)


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        page = run_everything(Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
