"""Replays of the transformer: memory passes, windows, parallel forwards, and the whole few-step loop."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arl2.evaluation.golden.vectors import Golden, Output, Precision
from arl2.model import HybridWanModel, keep_gates_in_float32
from arl2.rollout import FewStepSampler, denoise_block, predict_flow, remember_block
from arl2.state_memory import StateView
from arl2.statement import found_settings
from wan.checkpoints.loading import load_strict
from wan.memory import Memory, MemorySpec
from wan.teacher_forcing import teacher_forced_flow

MODEL_KEYS = (
    "patch_size",
    "text_len",
    "in_dim",
    "dim",
    "ffn_dim",
    "freq_dim",
    "text_dim",
    "out_dim",
    "num_heads",
    "num_layers",
    "qk_norm",
    "cross_attn_norm",
    "eps",
    "model_type",
)


def new_model(config: dict[str, Any], state: dict[str, Tensor]) -> HybridWanModel:
    """New model of a golden configuration; the names of the weights decide which layers are hybrid or have adapters."""
    found = found_settings(state)
    return HybridWanModel(
        **{key: config[key] for key in MODEL_KEYS if key in config},
        hybrid_layers=list(found.layers),
        lora_rank=found.lora_rank,
        lora_alpha=config.get("lora_alpha") or 1.0,
        ffn_lora=found.ffn_lora.value,
    )


def build_model(config: dict[str, Any], state: dict[str, Tensor], source: str, precision: Precision) -> HybridWanModel:
    """Build the small model of a golden file with its weights."""
    model = new_model(config, state)
    load_strict(model, state, source)
    keep_gates_in_float32(model.to(precision.device), precision.dtype)
    model.use_attention_backend(precision.backend)
    return model.eval()


def new_memory(model: HybridWanModel, config: dict[str, Any], precision: Precision) -> Memory:
    """Empty memory with the window and sink of a golden configuration."""
    window = config.get("local_attn_size", -1)
    spec = MemorySpec(
        batch_size=config["batch"],
        tokens_per_frame=config["tokens_per_frame"],
        device=precision.device,
        dtype=precision.dtype,
        frames=config["frames_per_block"],
        window_frames=None if window < 0 else window,
        sink_frames=config.get("sink_size", 0),
    )
    return model.new_memory(spec)


def states(memory: Memory, layers: list[int]) -> dict[int, Tensor]:
    """Copies of the recurrent states of the hybrid layers; later commits write in place."""
    views = memory.read(tokens=0)
    return {layer: views[layer].state_BHKV.clone() for layer in layers if isinstance(views[layer], StateView)}


def replay_passes(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G1 and G5: noisy passes that only read, clean passes that also write, and states after every commit."""
    config = golden.info["config"]
    yield from _replay_passes(golden, config, precision, golden.info.get("output_prefix", ""), "passes")


def replay_windowed_passes(golden: Golden, precision: Precision) -> Iterator[Output]:
    """G2: the same passes under several windows and sinks."""
    for name, case in golden.info["cases"].items():
        yield from _replay_passes(golden, golden.info["config"] | case, precision, case["output_prefix"], name)


def _replay_passes(
    golden: Golden, config: dict[str, Any], precision: Precision, prefix: str, case: str
) -> Iterator[Output]:
    model = build_model(config, golden.state(golden.info["state"]), golden.path.name, precision)
    memory = new_memory(model, config, precision)
    text = model.embed_text(golden.get("in.context", precision))
    for step in golden.info["passes"]:
        latents, start = golden.get(step["input"], precision), step["start_frame"]
        timestep = torch.tensor(float(step["timestep"]), device=precision.device)
        flow = predict_flow(model, latents, timestep, text, memory, start)
        yield Output(step["output"].replace("<case>.", prefix), flow, "output", case)
        if step["update_memory"]:
            remember_block(model, latents, text, memory, start, float(step["timestep"]))
            for layer, state in states(memory, config.get("hybrid_layers", [])).items():
                yield Output(f"{prefix}out.block{step['block']}.layer{layer}.state", state, "state", case)


def replay_parallel_forwards(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G3: teacher forcing and diffusion forcing over all blocks at once."""
    config = golden.info["config"]
    model = build_model(config, golden.state(golden.info["state"]), golden.path.name, precision)
    text = golden.get("in.context", precision)
    for name, case in golden.info["cases"].items():
        clean = case["clean_x"]
        # The reference's teacher-forcing mask knows no window.
        window = case["local_attn_size"] if clean is None and case["local_attn_size"] > 0 else None
        flow = teacher_forced_flow(
            model,
            golden.get(case["noisy"], precision),
            golden.tensors[case["timestep"]].to(precision.device),
            text,
            case["frames_per_block"],
            None if clean is None else golden.get(clean, precision),
            window,
        )
        yield Output(case["output"], flow, "output", name)


def replay_few_step_loops(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G6: the whole loop with all noise given, with or without a prefix of given frames."""
    for name, case in golden.info["cases"].items():
        yield from _replay_few_step_loop(golden, name, case, precision)


def _replay_few_step_loop(golden: Golden, name: str, case: dict[str, Any], precision: Precision) -> Iterator[Output]:
    config = case["config"]
    model = build_model(config, golden.state(case["state"]), golden.path.name, precision)
    memory = new_memory(model, config, precision)
    text = model.embed_text(golden.get(f"{name}.in.context", precision))
    sampler = FewStepSampler.from_steps(
        case["denoising_step_list"], case["timestep_shift"], case["warp_denoising_step"]
    )
    yield Output(f"{name}.out.warped_timesteps", torch.tensor(sampler.timesteps), "output", name)
    frames, latents = config["frames_per_block"], []
    if config["initial_latent_frames"]:
        given = golden.get(f"{name}.in.initial_latent", precision)
        for step in (step for step in case["passes"] if step["kind"] == "prefix"):
            first, end = step["initial_latent_frames"]
            remember_block(model, given[:, first:end], text, memory, step["start_frame"], step["timestep"])
        latents.append(given)
    all_noise = golden.get(f"{name}.in.noise", precision)
    for block, start in enumerate(range(0, all_noise.shape[1], frames)):
        steps: list[Tensor] = []

        def noise(step: int, block: int = block, start: int = start) -> Tensor:
            if step == 0:
                return all_noise[:, start : start + frames]
            return golden.get(f"{name}.in.block{block}.renoise{step - 1}", precision)

        first = config["initial_latent_frames"] + start
        x0 = denoise_block(model, sampler, noise, text, memory, first, on_x0=steps.append)
        for step, prediction in enumerate(steps):
            yield Output(f"{name}.out.block{block}.step{step}.x0", prediction, "output", name)
        remember_block(model, x0, text, memory, first, case["context_noise"])
        latents.append(x0)
    yield Output(f"{name}.out.final_latents", torch.cat(latents, dim=1), "output", name)
    for layer, state in states(memory, config.get("hybrid_layers", [])).items():
        yield Output(f"{name}.out.layer{layer}.state", state, "state", name)
