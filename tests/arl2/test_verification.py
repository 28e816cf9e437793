"""Golden files of other sizes than those in tests/golden: they must be replayed, not only those that were at hand.

There is no reference for them here, so the files are written from our own outputs; what is tested is that nothing in
the replay depends on one size, and that a change in a weight is noticed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from arl2.evaluation.golden.backbone import replay_few_step_loops, replay_parallel_forwards, replay_passes
from arl2.evaluation.golden.run import verify_file
from arl2.evaluation.golden.vectors import Golden, Precision, Replay
from arl2.model import HybridWanModel

CPU = Precision(torch.device("cpu"))
SIZE = {
    "patch_size": [1, 2, 2],
    "text_len": 7,
    "in_dim": 3,
    "dim": 36,
    "ffn_dim": 20,
    "freq_dim": 6,
    "text_dim": 5,
    "out_dim": 3,
    "num_heads": 2,
    "num_layers": 2,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
    "latent_height": 6,
    "latent_width": 2,
    "tokens_per_frame": 3,
    "batch": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax, pairs": {"frames_per_block": 2, "hybrid_layers": []},
    "one hybrid layer without adapters": {"frames_per_block": 1, "hybrid_layers": [1]},
    "adapters everywhere, windowed": {
        "frames_per_block": 4,
        "hybrid_layers": [0],
        "lora_rank": 5,
        "lora_alpha": 3.0,
        "ffn_lora": "all",
        "local_attn_size": 6,
        "sink_size": 1,
    },
}
TOLERANCE = {"output": {"max_abs": 1e-5, "rms_rel": 5e-6}, "state": {"max_abs": 3e-5, "rms_rel": 7e-6}}


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    keys = [key for key in SIZE if not key.startswith(("latent_", "tokens_", "batch"))]
    hybrid = {key: config[key] for key in ("hybrid_layers", "lora_rank", "lora_alpha", "ffn_lora") if key in config}
    state = HybridWanModel(**{key: config[key] for key in keys}, **hybrid).state_dict()
    return {f"state.{name}": value + 0.05 * torch.randn_like(value) for name, value in state.items()}


def write(folder: Path, info: dict[str, Any], tensors: dict[str, Tensor], replay: Replay) -> Path:
    """A golden file whose outputs are our own."""
    path = folder / "case.json"
    info |= {"file": "case.safetensors", "tolerance": TOLERANCE}
    path.write_text(json.dumps(info))
    save_file(tensors, path.with_suffix(".safetensors"))
    with torch.no_grad():
        outputs = {output.name: output.value.contiguous() for output in replay(Golden.read(path), CPU)}
    save_file(tensors | outputs, path.with_suffix(".safetensors"))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_of_other_sizes(variant: str, tmp_path: Path) -> None:
    config = SIZE | VARIANTS[variant]
    frames, blocks = config["frames_per_block"], 3
    shape = (config["batch"], frames, 3, 6, 2)
    passes, tensors = [], weights(config) | {"in.context": torch.randn(3, 7, 5)}
    for block in range(blocks):
        for kind, time, writes in (("noisy0", 900, False), ("clean", 0, True)):
            name = f"block{block}.{kind}"
            tensors[f"in.{name}"] = torch.randn(shape)
            step = {"block": block, "update_memory": writes, "timestep": time, "start_frame": block * frames}
            passes.append(step | {"input": f"in.{name}", "output": f"out.{name}"})
    state = {"file": "case.safetensors", "prefix": "state."}
    info = {"kind": "hybrid_model_inference", "config": config, "state": state, "passes": passes}
    path = write(tmp_path, info, tensors, replay_passes)
    [result] = verify_file(path, CPU)
    assert result.passed and result.compared == 2 * blocks + blocks * len(config["hybrid_layers"])

    changed = load_file(path.with_suffix(".safetensors"))
    changed["state.blocks.1.cross_attn.o.weight"] *= 1.01
    save_file(changed, path.with_suffix(".safetensors"))
    assert not verify_file(path, CPU)[0].passed
    del changed["state.blocks.1.cross_attn.o.weight"]
    save_file(changed, path.with_suffix(".safetensors"))
    [result] = verify_file(path, CPU)
    assert not result.passed and "missing" in (result.failure or "")


def test_a_loop_behind_a_prefix_of_another_length(tmp_path: Path) -> None:
    config = SIZE | {"frames_per_block": 2, "hybrid_layers": [1], "initial_latent_frames": 3, "batch": 1}
    prefix = [
        {"kind": "prefix", "initial_latent_frames": [0, 1], "start_frame": 0, "timestep": 0.0},
        {"kind": "prefix", "initial_latent_frames": [1, 3], "start_frame": 1, "timestep": 0.0},
    ]
    case = {
        "config": config,
        "state": {"file": "case.safetensors", "prefix": "state."},
        "denoising_step_list": [1000, 400],
        "warp_denoising_step": True,
        "timestep_shift": 3.0,
        "context_noise": 0,
        "passes": prefix,
    }
    tensors = weights(config) | {
        "a.in.context": torch.randn(1, 7, 5),
        "a.in.initial_latent": torch.randn(1, 3, 3, 6, 2),
        "a.in.noise": torch.randn(1, 4, 3, 6, 2),
        "a.in.block0.renoise0": torch.randn(1, 2, 3, 6, 2),
        "a.in.block1.renoise0": torch.randn(1, 2, 3, 6, 2),
    }
    info = {"kind": "few_step_autoregressive_pipeline", "cases": {"a": case}}
    [result] = verify_file(write(tmp_path, info, tensors, replay_few_step_loops), CPU)
    assert result.passed and result.compared == 1 + 4 + 1 + 1


def test_training_forwards_of_other_sizes(tmp_path: Path) -> None:
    config = SIZE | {"hybrid_layers": []}
    cases = {
        "tf": {"clean_x": "in.clean", "frames_per_block": 2, "local_attn_size": -1},
        "df": {"clean_x": None, "frames_per_block": 4, "local_attn_size": 5},
    }
    for name, case in cases.items():
        case |= {"noisy": "in.noisy", "timestep": "in.timestep", "output": f"{name}.out.flow"}
    video = {name: torch.randn(3, 8, 3, 6, 2) for name in ("in.clean", "in.noisy")}
    tensors = weights(config) | video | {"in.context": torch.randn(3, 7, 5), "in.timestep": 1000 * torch.rand(3, 8)}
    state = {"file": "case.safetensors", "prefix": "state."}
    info = {"kind": "causal_dit_training", "config": config, "state": state, "cases": cases}
    results = verify_file(write(tmp_path, info, tensors, replay_parallel_forwards), CPU)
    assert [result.case for result in results] == ["tf", "df"] and all(result.passed for result in results)


def test_manifests_with_other_adapters(tmp_path: Path) -> None:
    info = json.loads((GOLDEN / "G10_manifest_arl2_1.3b_hybrid_0-21.json").read_text())
    config = info["config"] | {"hybrid_layers": [3], "lora_rank": 8, "num_layers": 4}
    with torch.device("meta"):
        keys = [key for key in SIZE if key in config]
        model = HybridWanModel(**{key: config[key] for key in keys}, hybrid_layers=[3], lora_rank=8, ffn_lora="all")
    info |= {"config": config, "parameters": {name: list(value.shape) for name, value in model.state_dict().items()}}
    (tmp_path / "m.json").write_text(json.dumps(info))
    assert verify_file(tmp_path / "m.json", CPU)[0].passed
    info["parameters"]["blocks.0.extra"] = [1]
    (tmp_path / "m.json").write_text(json.dumps(info))
    assert "blocks.0.extra" in (verify_file(tmp_path / "m.json", CPU)[0].failure or "")
