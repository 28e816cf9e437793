"""Replays of parts: the hybrid layer alone, the noise schedule, the text encoder, the VAE."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arl2.evaluation.golden.vectors import Golden, Output, Precision
from arl2.hybrid_attention import HybridAttention
from arl2.model import keep_gates_in_float32
from wan.checkpoints.loading import load_strict
from wan.flow import FlowSchedule, add_noise, flow_to_x0, x0_to_flow
from wan.memory import MemorySpec
from wan.ops.rope import Rotary, rotary_angles
from wan.parallel import ParallelLayout
from wan.text import TextEncoder, umt5_from_native
from wan.vae.wan_vae import vae_from_native


def replay_hybrid_attention(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G4: the layer alone, with and without adapters, in parallel, block by block, and with teacher forcing."""
    for name, case in golden.info["cases"].items():
        yield from _replay_hybrid_case(golden, name, case, precision)


def build_hybrid_attention(golden: Golden, lora: dict[str, Any] | None, precision: Precision) -> HybridAttention:
    """Build the layer of a G4 file with its weights."""
    config = golden.info["config"]
    rank, alpha = (lora["rank"], lora["alpha"]) if lora else (None, 1.0)
    layer = HybridAttention(config["dim"], config["num_heads"], config["qk_norm"], config["eps"], rank, alpha)
    state = golden.state(golden.info["state"])
    if not lora:
        state = {key: value for key, value in state.items() if not key.startswith("lora_")}
    load_strict(layer, state, golden.path.name)
    keep_gates_in_float32(layer.to(precision.device), precision.dtype)
    layer.backend = precision.backend
    return layer.eval()


def _rotary(config: dict[str, Any], frames: Tensor) -> Rotary:
    return rotary_angles(frames, config["grid_height"], config["grid_width"], config["head_dim"])


def _replay_hybrid_case(golden: Golden, name: str, case: dict[str, Any], precision: Precision) -> Iterator[Output]:
    config, prefix = golden.info["config"], case["output_prefix"]
    layer = build_hybrid_attention(golden, case["lora"], precision)
    clean = golden.get("in.x_clean", precision)
    gates = {"log_decay": layer.log_decay(clean), "beta": layer.beta(clean), "output_gate": layer.output_gate(clean)}
    for gate, value in gates.items():
        yield Output(f"{prefix}{gate}", value, "gates", name)
    noisy_names = sorted(key for key in golden.tensors if key.startswith("in.x_noisy"))
    noisy = [golden.get(key, precision) for key in noisy_names]
    yield from _replay_parallel(layer, config, prefix, name, clean, noisy[0], case["lora"] is not None)
    yield from _replay_block_by_block(layer, config, prefix, name, clean, noisy)


def _replay_parallel(
    layer: HybridAttention, config: dict[str, Any], prefix: str, name: str, clean: Tensor, noisy: Tensor, forced: bool
) -> Iterator[Output]:
    num_frames = config["num_blocks"] * config["frames_per_block"]
    frames = torch.arange(num_frames, device=clean.device)
    for halves, key in ((1, "parallel"), (2, "teacher_forcing_consistent")):
        if halves == 2 and not forced:
            return
        layout = ParallelLayout(
            num_frames, config["frames_per_block"], config["tokens_per_frame"], halves, clean.device
        )
        x = torch.cat([clean, noisy], dim=1) if halves == 2 else clean
        rotary = _rotary(config, frames.repeat(halves))
        out, _ = layer(x, rotary, layer.parallel_view(layout), attend=True, remember=False)
        yield Output(f"{prefix}{key}", out, "output", name)


def _replay_block_by_block(
    layer: HybridAttention, config: dict[str, Any], prefix: str, name: str, clean: Tensor, noisy: list[Tensor]
) -> Iterator[Output]:
    size, frames = config["tokens_per_block"], config["frames_per_block"]
    spec = MemorySpec(clean.shape[0], config["tokens_per_frame"], clean.device, clean.dtype, frames)
    memory = layer.new_memory(spec)
    reads: list[list[Tensor]] = [[] for _ in noisy]
    commits = []
    for block in range(config["num_blocks"]):
        tokens = slice(block * size, (block + 1) * size)
        rotary = _rotary(config, torch.arange(block * frames, (block + 1) * frames, device=clean.device))
        for outputs, x in zip(reads, noisy, strict=True):
            outputs.append(layer(x[:, tokens], rotary, memory.read(size), attend=True, remember=False)[0])
        out, update = layer(clean[:, tokens], rotary, memory.read(size), attend=True, remember=True)
        memory.commit(update)
        commits.append(out)
        yield Output(f"{prefix}block{block}.state", memory.read(size).state_BHKV, "state", name)
    for index, outputs in enumerate(reads):
        yield Output(f"{prefix}read{index}", torch.cat(outputs, dim=1), "output", name)
    yield Output(f"{prefix}commit", torch.cat(commits, dim=1), "output", name)


def replay_schedule(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G7: noise tables, lookups and conversions; always in float32."""
    timesteps = golden.tensors["in.timestep"]
    x0, noise, flow = (golden.tensors[f"in.{name}"] for name in ("x0", "noise", "flow"))
    for name, case in golden.info["cases"].items():
        schedule, prefix = FlowSchedule(case["shift"]), case["output_prefix"]
        sigmas = schedule.sigma_at(timesteps)
        x_t = add_noise(x0, noise, sigmas)
        values = [
            ("sigmas", schedule.sigmas, "sigmas"),
            ("timesteps", schedule.timesteps, "timesteps"),
            ("training_weights", schedule.training_weights, "training_weights"),
            ("training_weight_at_t", schedule.weight_at(timesteps), "training_weights"),
            ("add_noise", x_t, "latents"),
            ("flow_to_x0", flow_to_x0(flow, x_t, sigmas), "latents"),
            ("x0_to_flow", x0_to_flow(x0, x_t, sigmas), "x0_to_flow"),
            ("training_target", noise - x0, "latents"),
        ]
        for key, value, group in values:
            yield Output(f"{prefix}{key}", value, group, name, fixed_precision=True)
        yield Output(f"{prefix}nearest_index", schedule.nearest_index(timesteps), "", name, exact=True)
        for key in golden.tensors:
            if key.startswith(f"{prefix}warped_"):
                steps = [int(step) for step in key.removeprefix(f"{prefix}warped_").split("_")]
                yield Output(key, schedule.warp(steps), "timesteps", name, fixed_precision=True)


def replay_text_encoder(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G8: the text encoder on given token ids."""
    config = golden.info["config"]
    model = umt5_from_native(golden.state(golden.info["state"]), config).to(precision.device, precision.dtype).eval()
    ids, mask = golden.get("in.ids", precision), golden.get("in.mask", precision)
    encoder = TextEncoder(model, None, text_len=ids.shape[1])
    yield Output("out.context", encoder.encode_ids(ids, mask), "output", "encode")


def replay_vae(golden: Golden, precision: Precision) -> Iterator[Output]:
    """Replay G9: encoding, whole decoding and streamed decoding of the VAE; the file has channels first."""
    info = golden.info
    config = info["config"] | {
        "latent_mean": golden.tensors["latent_mean"].tolist(),
        "latent_std": golden.tensors["latent_std"].tolist(),
    }
    vae = vae_from_native(golden.state(info["state"]), config).to(precision.device, precision.dtype)
    pixels = golden.get("in.pixel", precision).transpose(1, 2)
    latents = golden.get("in.latent", precision).transpose(1, 2)
    encoded = vae.encode(pixels)
    mean, std = (golden.get(name, precision).view(1, -1, 1, 1, 1) for name in ("latent_mean", "latent_std"))
    yield Output("out.encode_mean", encoded.transpose(1, 2), "encode", "encode")
    yield Output("out.encode_mean_raw", encoded.transpose(1, 2) * std + mean, "encode", "encode")
    yield Output("out.decode", vae.decode(latents, clamp=False).transpose(1, 2), "decode", "decode")
    stream = vae.decode_stream()
    for index, chunk in enumerate(latents.split(config["latent_chunks_streamed"], dim=1)):
        value = stream.decode(chunk, clamp=False)
        yield Output(f"out.stream.chunk{index}", value.transpose(1, 2), "decode", "stream")
