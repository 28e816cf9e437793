# %% [markdown]
# # The pipeline, as users of diffusers expect it
#
# Every cell runs on a CPU in seconds, on the toy world's model. `tests/pipelines/diffusers/test_walkthrough.py` runs
# them all. Start it in the repository's folder: `python docs/diffusers_walkthrough.py`, or cell by cell in an editor.

# %%
"""Every call of `CausalVideoPipeline` that users of diffusers know, and what each wrong call answers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline
from PIL import Image

from pipelines.config import MemoryConfig, MemoryKind, SpeedConfig
from pipelines.generation.hub.loaded import write_pipeline_file
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.media.video import VideoWriter
from wan.utils.errors import InputError

MODEL = Path(__file__).resolve().parents[1] / "models" / "toyworld"
PROMPT = "a red ring rolls behind the wall and comes out again"
SHORT = 9  # frames: 3 latent frames, one block
QUICK: dict[str, Any] = {"num_frames": SHORT, "height": 32, "width": 48, "num_inference_steps": 1}  # no good video
answers: dict[str, str] = {}


def refused(what: str, call: Callable[[], Any]) -> None:
    """Show the one line that a wrong call answers, before anything is computed."""
    try:
        call()
    except (InputError, TypeError) as error:
        answers[what] = str(error)
        print(f"{what}: {error}")
    else:
        raise AssertionError(f"{what} was not refused")


# %% [markdown]
# ## Loading
#
# A folder is read as it is and never asks the hub. A name such as "owner/model" comes through huggingface_hub's cache,
# where there is no such folder. Types and devices go by name too.

# %%
pipe = CausalVideoPipeline.from_pretrained(str(MODEL), dtype="float32", device_map="cpu")
pipe.optimize_for_inference()  # on a CPU, the fast decoder; on a GPU the first call does so by itself
pipe.set_progress_bar_config(disable=True)
print(type(pipe.transformer).__name__, pipe.transformer.dtype, f"loaded in {pipe.load_seconds:.1f} s")

refused("another type", lambda: CausalVideoPipeline.from_pretrained(MODEL, dtype="int3"))
refused("balanced", lambda: CausalVideoPipeline.from_pretrained(MODEL, device_map="balanced"))
refused("an unknown argument", lambda: CausalVideoPipeline.from_pretrained(MODEL, variant="fp16"))
refused("no such model", lambda: CausalVideoPipeline.from_pretrained("nobody/nothing", local_files_only=True))

# %% [markdown]
# ## One call
#
# Height, width and frames are those that the model's folder stores (here 64×96 pixels, 81 frames), unless a call says
# otherwise. `stream` takes the same arguments and hands out every block as soon as it exists.

# %%
frames = pipe(PROMPT, output_type="pil", generator=torch.Generator().manual_seed(0), **QUICK).frames[0]
print(len(frames), frames[0].size)
array = pipe(PROMPT, seeds=[0], **QUICK).frames
(tensor,) = pipe(PROMPT, seeds=[0], output_type="pt", return_dict=False, **QUICK)
latents = pipe(PROMPT, seeds=[0], output_type="latent", **QUICK).frames
print(array.shape, tuple(tensor.shape), tuple(latents.shape))
for block in pipe.stream(PROMPT, **(QUICK | {"num_frames": 21})):
    print("block", block.index, tuple(block.frames_BTHWC.wait().shape))

refused("frames that cannot be", lambda: pipe(PROMPT, num_frames=10))
refused("frames of no block", lambda: pipe(PROMPT, num_frames=13))
refused("a size that cannot be", lambda: pipe(PROMPT, height=60))
refused("no prompt", lambda: pipe())
refused("an empty prompt", lambda: pipe("  "))
refused("an unknown output", lambda: pipe(PROMPT, output_type="gif"))
refused("an unknown argument of the call", lambda: pipe(PROMPT, guidance_rescale=0.7))
refused("a negative prompt in the place of frames", lambda: pipe(PROMPT, "blurry"))
refused("a seed in the place of a list", lambda: pipe(PROMPT, seeds=7))

# %% [markdown]
# ## Batches, seeds, noise
#
# A video depends on its own seed alone. `latents` is the noise that blocks start from, [videos, latent frames,
# channels, height, width], which is also the order of `output_type="latent"` (diffusers' Wan has channels first).

# %%
generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
two = pipe(PROMPT, num_videos_per_prompt=2, generator=generators, output_type="latent", **QUICK).frames
noise = torch.randn(1, 3, pipe.transformer.config.in_dim, *pipe.latent_size(32, 48))
given = pipe(PROMPT, latents=noise, seeds=[0], output_type="latent", **QUICK).frames
print(tuple(two.shape), tuple(given.shape))

refused("generators of others", lambda: pipe(PROMPT, generator=generators))
refused(
    "noise in another order", lambda: pipe(PROMPT, num_frames=SHORT, latents=noise.transpose(1, 2), height=32, width=48)
)

# %% [markdown]
# ## Text
#
# Without a text encoder a pipeline takes embeddings. `max_sequence_length` cuts prompts; padding follows the cut.

# %%
embeds = pipe.encode_prompt([PROMPT])
bare = CausalVideoPipeline.from_pretrained(MODEL, text_encoder=None, optimize=SpeedConfig())
bare.set_progress_bar_config(disable=True)
from_embeds = bare(prompt_embeds=embeds, seeds=[0], output_type="latent", **QUICK).frames
assert torch.equal(from_embeds, latents)
pipe(PROMPT, max_sequence_length=4, output_type="latent", **QUICK)

refused("words without a text encoder", lambda: bare(PROMPT))
refused("words and embeddings", lambda: pipe(PROMPT, prompt_embeds=embeds))
refused("too many tokens", lambda: pipe(PROMPT, max_sequence_length=100_000))

# %% [markdown]
# ## Steps and guidance
#
# Few-step models are distilled: guidance is built in, and asking for it is refused. A model that was trained with
# dropped prompts says `guidance_distilled: false` in its model_index.json, and is guided where `guidance_scale > 1`.
# The toy model was not, so what it makes here is only to show the call.

# %%
pipe(PROMPT, output_type="latent", **(QUICK | {"num_inference_steps": 2}))
pipe(PROMPT, num_frames=SHORT, height=32, width=48, timesteps=[1000, 600, 300], output_type="latent")
guided = CausalVideoPipeline.from_pretrained(MODEL, guidance_distilled=False, optimize=SpeedConfig())
guided.set_progress_bar_config(disable=True)
guided(PROMPT, negative_prompt="a blue cross", guidance_scale=2.0, output_type="latent", **QUICK)

refused("guidance of a distilled model", lambda: pipe(PROMPT, guidance_scale=5.0))
refused("a negative prompt for one", lambda: pipe(PROMPT, negative_prompt="blurry"))
refused("steps twice", lambda: pipe(PROMPT, num_inference_steps=4, timesteps=[500]))
refused("steps that rise", lambda: pipe(PROMPT, timesteps=[500, 700]))

# %% [markdown]
# ## Callbacks
#
# Called after every step of every block; steps are counted over the video.


# %%
def watch(pipeline: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
    """Say where a video is."""
    print("step", step, f"timestep {timestep:.0f}", tuple(tensors["latents"].shape))
    return tensors


pipe(PROMPT, num_frames=SHORT, height=32, width=48, callback_on_step_end=watch, output_type="latent")

refused("tensors that there are not", lambda: pipe(PROMPT, callback_on_step_end_tensor_inputs=["noise_pred"]))

# %% [markdown]
# ## Memory of earlier blocks
#
# By name, or with its sizes. "trained" is the default: what the checkpoint was trained with.

# %%
pipe(PROMPT, memory="window", output_type="latent", **QUICK)
pipe(
    PROMPT, num_frames=21, memory=MemoryConfig(MemoryKind.window, window_frames=6, sink_frames=0), output_type="latent"
)

refused("an unknown memory", lambda: pipe(PROMPT, memory="everything"))
refused("a window without room for a block", lambda: pipe(PROMPT, memory=MemoryConfig(MemoryKind.window, 3, 2)))

# %% [markdown]
# ## From a picture, from a video, through a video again
#
# A picture is the first latent frame, and stays as it is while the other frames of its block are denoised. A video to
# continue is remembered block by block; frames left over at its end begin the next block in the same way. With
# `strength`, the blocks of a given video are noised and take the last steps again. Results hold the given frames too.

# %%
picture = Image.new("RGB", (96, 64), (240, 240, 240))
pipe(PROMPT, image=picture, output_type="latent", **QUICK)
with tempfile.TemporaryDirectory() as folder:
    clip = Path(folder) / "clip.mp4"
    with VideoWriter(clip, 32, 48) as writer:
        writer.write((array[0] * 255).round().astype(np.uint8))
    longer = pipe(PROMPT, video=clip, **(QUICK | {"num_frames": 21})).frames
    again = pipe(PROMPT, height=32, width=48, video=clip, strength=0.5).frames
    print(longer.shape, again.shape)
    refused("a video without room", lambda: pipe(PROMPT, num_frames=SHORT, video=clip))
    refused("strength of no step", lambda: pipe(PROMPT, video=clip, strength=0.1))
refused("strength of nothing", lambda: pipe(PROMPT, strength=0.5))
refused("no such video", lambda: pipe(PROMPT, video="nowhere.mp4"))
refused("a picture of floats", lambda: pipe(PROMPT, image=np.zeros((64, 96, 3))))

# %% [markdown]
# ## LoRAs
#
# As in diffusers: `load_lora_weights`, `set_adapters`, `get_active_adapters`, `get_list_adapters`, `disable_lora`,
# `enable_lora`, `delete_adapters`, `fuse_lora`, `unfuse_lora`, `unload_lora_weights`. Layouts of files and differences
# stand in `docs/checkpoints.md`.

# %%
change = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((pipe.transformer.config.dim,), 0.1)}
pipe.load_lora_weights(change, adapter_name="style")
pipe.set_adapters("style", 0.5)
pipe.disable_lora()
print(pipe.get_list_adapters(), pipe.get_active_adapters())
pipe.enable_lora()
refused("a weight of no number", lambda: pipe.set_adapters("style", "strong"))
refused("one adapter twice", lambda: pipe.set_adapters(["style", "style"], [0.5, 1.0]))
refused("an adapter that is not there", lambda: pipe.delete_adapters("motion"))
pipe.delete_adapters("style")
pipe.unload_lora_weights()

refused("no LoRA is loaded", lambda: pipe.set_adapters("style"))

# %% [markdown]
# ## Speed
#
# On a CUDA device the first call compiles blocks and records passes. `from_pretrained(…, optimize=False)` and
# `leave_fast_form()` switch that off; `to`, LoRAs and values written into weights undo it, and the next call redoes it.

# %%
pipe.optimize_for_inference(SpeedConfig(compile=False))
pipe.leave_fast_form()

refused("graphs on a CPU", lambda: pipe.optimize_for_inference(SpeedConfig(cuda_graphs=True)))

# %% [markdown]
# ## Less memory
#
# Tiles are bands of rows, decoded one after the other to the same frames, without seams. Offloading needs a GPU; the
# VAE stays there, since every block is decoded at once.

# %%
pipe.enable_vae_tiling(tile_sample_min_height=16)
pipe.enable_vae_slicing()
tiled = pipe(PROMPT, seeds=[0], **QUICK).frames
print("largest difference", float(np.abs(tiled - array).max()))
pipe.disable_vae_tiling()
pipe.disable_vae_slicing()
if not torch.accelerator.is_available():
    refused("offloading without a GPU", pipe.enable_model_cpu_offload)
    refused("layer by layer without a GPU", pipe.enable_sequential_cpu_offload)
offloaded = CausalVideoPipeline.from_pretrained(MODEL)
offloaded.set_progress_bar_config(disable=True)
refused("whole blocks", lambda: offloaded.enable_group_offload(torch.device("cpu"), offload_type="block_level"))
offloaded.enable_model_cpu_offload(device="cpu")  # to see that it computes the same; of use with "cuda"
assert torch.equal(offloaded(PROMPT, seeds=[0], output_type="latent", **QUICK).frames, latents)
refused("the fast form of what is offloaded", lambda: offloaded.optimize_for_inference(SpeedConfig(compile=True)))

# %% [markdown]
# ## Fewer bits
#
# `quantization_config` goes to diffusers' own loader: bitsandbytes (on a GPU), torchao and the others. What is missing
# is named.

# %%
if not torch.accelerator.is_available():
    config = BitsAndBytesConfig(load_in_8bit=True)
    refused("eight bits", lambda: CausalVideoPipeline.from_pretrained(MODEL, quantization_config=config))

# %% [markdown]
# ## Saving, and plain diffusers
#
# `save_pretrained` writes a folder that `from_pretrained` reads. `scripts/export_hub.py` adds a model card, and the
# file that lets `DiffusionPipeline.from_pretrained` load it where this package is installed.

# %%
with tempfile.TemporaryDirectory() as folder:
    pipe.save_pretrained(folder)
    write_pipeline_file(Path(folder))
    plain = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(plain(PROMPT, seeds=[0], output_type="latent", **QUICK).frames, latents)
    print(type(plain).__name__)
