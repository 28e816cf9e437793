"""Text to video: prompt → block-autoregressive rollout → streamed decode, in the manner of a diffusers pipeline."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from arl2.adapters import read_loras
from arl2.checkpoint import build_hybrid, read_generator
from arl2.inference.cuda_graphs import GraphedModel
from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel
from arl2.inference.parallel.factory import Exchange, new_sequence_parallel, new_sharded_weights
from arl2.inference.parallel.sequence_parallel import SequenceParallel, ShardedWeights
from arl2.model import HybridSettings, HybridWanModel, keep_gates_in_float32
from arl2.rollout import FewStepSampler, SeededNoise, num_blocks, predict_flow, remember_block, rollout
from pipelines.config import GeneratorSampling, MemoryConfig, SpeedConfig, check_size, stored_sampling
from pipelines.feasibility import check_speed
from pipelines.generation.blocks import GIVEN, TEXT, NonFiniteBlockError, VideoBlock, VideoOutput
from pipelines.generation.decoding import BlockDecoder, Phase
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.mixins.lora import LoRAPipelineMixin
from pipelines.generation.mixins.placement import PlacementMixin
from pipelines.generation.streaming import SideStream, finished
from pipelines.media.images import Picture, first_frames
from pipelines.prompts.files import check_prompt
from wan.checkpoints.formats import transformer_config
from wan.checkpoints.lora import LoRASource
from wan.checkpoints.saving import give_umask_mode
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel
from wan.ops.attention import AttentionBackend
from wan.text import TextEncoder, load_text_encoder
from wan.utils.device import wide_range_dtype
from wan.utils.errors import InputError
from wan.utils.files import writing
from wan.utils.ranges import typed
from wan.vae.tiny import load_tiny_decoder
from wan.vae.wan_vae import WanVAE, load_vae

log = logging.getLogger(__name__)


class CausalVideoPipeline(LoRAPipelineMixin, PlacementMixin, DiffusionPipeline):
    """Text to video with a causal Wan transformer, hybrid or softmax.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts. VAE and text encoder are cast out of float16, whose range
            their activations exceed, as `wan.utils.device.wide_range_dtype` says.
        frames_per_block: latent frames generated at a time.
        denoising_steps, warp_denoising_steps, timestep_shift: see `arl2.rollout.FewStepSampler`.
        context_noise: timestep of the clean pass.
        first_block_denoising_steps: steps of a video's first block, if it has its own.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: HybridWanModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        frames_per_block: int = 3,
        denoising_steps: Sequence[int] = (1000, 750, 500, 250),
        warp_denoising_steps: bool = True,
        timestep_shift: float = 5.0,
        context_noise: float = 0.0,
        first_block_denoising_steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        sampling = {
            "frames_per_block": frames_per_block,
            "denoising_steps": list(denoising_steps),
            "warp_denoising_steps": warp_denoising_steps,
            "timestep_shift": timestep_shift,
            "context_noise": context_noise,
            "first_block_denoising_steps": first_block_denoising_steps and list(first_block_denoising_steps),
        }
        typed(GeneratorSampling, sampling, "")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(**sampling)
        self.sampler = FewStepSampler.from_steps(
            denoising_steps, timestep_shift, warp_denoising_steps, first_block_denoising_steps
        )
        self.wan_vae = WanVAE(vae)
        self._fast: FlowModel | None = None
        self._pool: MemoryPool | None = None
        self._side: SideStream | None = None
        self._parallel: SequenceParallel | None = None
        self._sharded: ShardedWeights | None = None
        self._known_cuts = set[str]()
        self._memories_warned_of: set[tuple[int | None, int]] = set()
        self._undo = ExitStack()
        self.load_seconds: float | None = None
        self.warm_up_seconds: float | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        checkpoint_path: str | Path | None = None,
        use_ema: bool = False,
        hybrid: HybridSettings = HybridSettings(),
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),
        vae_device: torch.device | None = None,
        seed: int = 0,
        lora: Sequence[LoRASource] = (),
        **sampling: Any,
    ) -> Self:
        """Load every part, strictly and offline, from a native Wan 2.1 folder or a diffusers folder.

        `load_seconds` keeps how long it took.

        Args:
            pretrained_model_name_or_path: the folder; never asks a hub.
            checkpoint_path: transformer weights, see `arl2.checkpoint.read_generator`; those of the folder without it.
            use_ema: take `generator_ema` of a checkpoint that has both.
            hybrid: hybrid layers and adapters; by default those of the weights.
            torch_dtype, device: of all parts; float16 only of the transformer.
            vae_device: where the VAE goes instead, to decode beside the transformer's work.
            seed: of parameters that a conversion adds.
            lora: LoRAs that become a part of the transformer, without a way back; see `load_lora_weights` for others.
            sampling: settings of this class that replace those stored in the folder.

        Raises:
            CheckpointError, InputError: something is missing, damaged or does not fit.
        """
        begin, folder = time.perf_counter(), Path(pretrained_model_name_or_path)
        weights = read_generator(folder, checkpoint_path, use_ema)
        loras = read_loras(weights.state, lora)
        transformer, _ = build_hybrid(
            weights, transformer_config(folder), hybrid, dtype=torch_dtype, device=device, seed=seed
        )
        vae = load_vae(folder, dtype=torch_dtype, device=vae_device or device)
        text = load_text_encoder(folder, text_len=transformer.config.text_len, dtype=torch_dtype, device=device)
        pipeline = cls(transformer, vae.model, text.model, text.tokenizer, **(stored_sampling(folder) | sampling))
        pipeline.merge_loras(loras)
        pipeline.load_seconds = time.perf_counter() - begin
        log.info("model loaded in %.1f s", pipeline.load_seconds)
        return pipeline

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the parts, arguments as for diffusers' pipelines; only the transformer is cast to float16."""
        if torch.float16 not in (*args, kwargs.get("dtype")):
            return super().to(*args, **kwargs)
        others = [argument for argument in args if argument is not torch.float16]
        super().to(*others, **{name: value for name, value in kwargs.items() if name != "dtype"})
        keep_gates_in_float32(self.transformer, torch.float16)
        self.wan_vae.to(dtype=torch.float16)
        if self.text_encoder is not None:
            self.text_encoder.to(dtype=wide_range_dtype(torch.float16, self.text_encoder.device))
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As in diffusers, but files get the mode that the umask says.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        with writing(Path(save_directory)):
            super().save_pretrained(save_directory, **options)
            give_umask_mode(Path(save_directory))

    @property
    def flow_model(self) -> FlowModel:
        """Model that computes the transformer's passes: itself, or its fast form."""
        return self._fast or self.transformer

    @property
    def symmetric_bytes(self) -> int:
        """Bytes on this GPU that others of a parallel run can address; PyTorch's allocator does not count them."""
        return sum(part.symmetric_bytes for part in (self._parallel, self._sharded) if part is not None)

    @property
    def overlaps_decoding(self) -> bool:
        """Whether a block is decoded while the next is denoised."""
        on_two_gpus = self.vae_is_apart and {self.device.type, self.wan_vae.device.type} == {"cuda"}
        return self._side is not None or on_two_gpus

    def parallelize(self, exchange: Exchange = Exchange.AUTO) -> None:
        """Compute every pass together with the other processes of `torch.distributed`'s default group from now on.

        All of them must make the same calls, and all get the same latents; memories hold the heads of their process.
        Call it before `optimize_for_inference`, which makes the form of the transformer that does it. `stream` divides
        decoding too, if it is given a `Lockstep` and the fast decoder is on.

        Args:
            exchange: how GPUs exchange tokens for heads.

        Raises:
            InputError: the heads do not divide over the processes, the GPUs cannot exchange in this way, or the VAE
                has a device of its own.
        """
        self.require_one_device("parallelize, with which every process decodes a part of each frame,")
        self._parallel = new_sequence_parallel(self.transformer.config.num_heads, self.transformer.device, exchange)
        self.transformer.head_shards = self._parallel.size

    def optimize_for_inference(self, speed: SpeedConfig) -> None:
        """Compute the transformer's passes the fast way from now on, as its weights and switches are now.

        Feed-forward adapters are merged meanwhile. A later call undoes what this one did, first of all. Call it when
        everything is on its device.

        Args:
            speed: what to switch on; if nothing of the transformer, the plain one computes.

        Raises:
            InputError: the device cannot.
        """
        device, config = self.transformer.device, self.transformer.config
        speed = speed.on(device, self.transformer.dtype)
        check_speed(speed, device, self.transformer.dtype, config.dim, config.ffn_dim)
        self._speed = speed
        self.leave_fast_form()
        if speed.vae_device is not None:
            self._undo.callback(self.move_vae(speed.vae_on(device)))
        self._side = SideStream(device) if speed.overlap_decoding and not self.vae_is_apart else None
        self.wan_vae.fast, self.wan_vae.tiny = speed.fast_vae, None
        if speed.tiny_vae is not None:
            self.wan_vae.tiny = load_tiny_decoder(
                speed.tiny_vae, self.wan_vae.latent_channels, dtype=self.wan_vae.dtype, device=self.wan_vae.device
            )
        parallel = self._parallel
        self._sharded = sharded = new_sharded_weights(parallel, device) if speed.shard_weights else None
        if not (speed.compile or speed.cuda_graphs or speed.fp8 or speed.kernels or parallel is not None):
            return
        # On the CPU the adapters' layers cost a GPU no memory, and come back exactly.
        adapters = self.transformer.merge_ffn_lora(keep_on=torch.device("cpu"))
        self._undo.callback(self.transformer.unmerge_ffn_lora, adapters)
        switches = bool(speed.compile), speed.fp8, bool(speed.kernels)
        fast = InferenceModel(self.transformer, *switches, parallel, sharded)
        self._undo.callback(fast.release)
        self._pool = MemoryPool(self.transformer)
        if not speed.cuda_graphs or not (parallel is None or parallel.can_be_recorded):
            self._fast = fast
            return
        # A kernel of ours costs the CPU more to launch than one of the compiler's: 29 fps where a pass is not recorded.
        launched = fast.without_kernels() if speed.kernels and speed.compile else fast
        self._fast = GraphedModel(fast, device, launched)

    def leave_fast_form(self) -> None:
        """Undo what `optimize_for_inference` did to the transformer: its own passes are computed from now on."""
        self._fast = self._pool = None
        self._undo.close()

    @torch.no_grad()
    def warm_up(self, height: int, width: int, memory: MemoryConfig, batch_size: int = 1) -> float:
        """Run two blocks on noise, so that kernels are compiled, tuned and loaded.

        Over a full memory passes that are recorded and those that are not have kernels of their own: the second block
        has some of both.

        Returns:
            seconds that it took, which `warm_up_seconds` keeps.
        """
        begin, config, device = time.perf_counter(), self.transformer.config, self._execution_device
        size = self._latent_size(height, width)
        embeds = torch.zeros(batch_size, config.text_len, config.text_dim, device=device, dtype=self.transformer.dtype)
        text, state = self.transformer.embed_text(embeds), self.new_memory(batch_size, height, width, None, memory)
        latents = torch.randn(batch_size, self.config.frames_per_block, config.in_dim, *size, device=device)
        for start in (0, self.config.frames_per_block):
            for _ in range(2):
                predict_flow(self.flow_model, latents, torch.full((), 500.0, device=device), text, state, start)
            remember_block(self.flow_model, latents, text, state, start, self.config.context_noise)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.warm_up_seconds = time.perf_counter() - begin
        log.info("transformer warmed up in %.1f s", self.warm_up_seconds)
        return self.warm_up_seconds

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, text_len, text_dim]; rows of padding are zero.

        Raises:
            InputError: a prompt is empty, or the text encoder was not loaded.
        """
        for prompt in prompts:
            check_prompt(prompt, "the prompt")
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("this pipeline has no text encoder: pass prompt_embeds")
        text_len = self.transformer.config.text_len
        encoder = TextEncoder(self.text_encoder, self.tokenizer, text_len, known_cuts=self._known_cuts)
        return encoder.encode(prompts)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` frames.

        Raises:
            InputError: the VAE cannot make that number.
        """
        stride = self.wan_vae.temporal_compression
        if num_frames < 1 or (num_frames - 1) % stride:
            raise InputError(f"{num_frames} frames cannot be decoded: give 1 plus a multiple of {stride}")
        return (num_frames - 1) // stride + 1

    def resolve_memory(self, memory: MemoryConfig) -> MemoryConfig:
        """The memory that a request means for this model; one that training did not meet is warned of, once."""
        trained = self.transformer.trained_memory
        warning = memory.warning(trained, bool(self.transformer.hybrid.layers))
        if warning is not None and memory.window not in self._memories_warned_of:
            self._memories_warned_of.add(memory.window)
            log.warning("%s", warning)
        return memory.resolved(trained)

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        stride = self.wan_vae.spatial_compression
        check_size(height, width, stride, self.transformer.patch_size)
        return height // stride, width // stride

    def new_memory(
        self, batch_size: int, height: int, width: int, latent_frames: int | None, memory: MemoryConfig
    ) -> Memory:
        """An empty memory for videos of this size.

        Args:
            latent_frames: of the whole video, to be allocated at once; None if it is not known.
            memory: of the softmax layers; another than the model was trained with is warned of once.
        """
        memory.fitting(self.transformer.trained_memory, self.config.frames_per_block, "this model")
        memory = self.resolve_memory(memory)
        window_frames, sink_frames = memory.window_for(latent_frames)
        spec = MemorySpec(
            batch_size=batch_size,
            tokens_per_frame=self.transformer.tokens_per_frame(*self._latent_size(height, width)),
            device=self._execution_device,
            dtype=self.transformer.dtype,
            frames=latent_frames or self.config.frames_per_block,
            window_frames=window_frames,
            sink_frames=sink_frames,
            head_shards=self.transformer.head_shards,
        )
        return (self._pool or self.transformer).new_memory(spec)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = 81,
        height: int = 480,
        width: int = 832,
        *,
        prompt_embeds: Tensor | None = None,
        image: Picture | Sequence[Picture] | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        memory: MemoryConfig | None = None,
        phase: Phase = lambda name: nullcontext(),
        lockstep: Lockstep | None = None,
    ) -> Iterator[VideoBlock]:
        """Generate a video and hand out its frames block by block.

        Args:
            prompt: one, or one a video of the batch; `prompt_embeds` from `encode_prompt` may take its place.
            num_frames: frames of the video; None to go on for ever (give `memory` a window then).
            height, width: pixels.
            image: what to start with, remembered first: a picture (PIL, uint8 [H, W, 3] or a file) or a list of one per
                video, which are scaled and cropped about their centre; or frames [B, T, 3, H, W] in [-1, 1],
                T = 1 + 4k. See `pipelines.media.images.first_frames`.
            seeds: one a video; without them, drawn from `generator` (or from torch's own).
            memory: of the softmax layers; by default what the model was trained with, full if it does not say.
            phase: entered around "text", "denoise", "remember" and "vae", to time them.
            lockstep: of processes that compute the video together. Each decodes a band of rows with the fast decoder;
                others work on the leading process alone. Those that follow hand out nothing.

        Yields:
            blocks in order; the first brings the given frames too. On a GPU the next block is computed meanwhile: take
            `frames_BTHWC`, since any other copy to the CPU would wait for that too.

        Raises:
            InputError: sizes that do not fit.
            NonFiniteBlockError: text, given frames, latents or pixels hold NaN or infinity.
        """
        self.wan_vae.leave_float16()
        device, frames_per_block = self._execution_device, self.config.frames_per_block
        size = self._latent_size(height, width)
        if prompt_embeds is None:
            if prompt is None:
                raise InputError("give a prompt or prompt_embeds")
            with phase("text"):
                prompt_embeds = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt)
        batch = prompt_embeds.shape[0]
        if seeds is None:
            seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
        if len(seeds) != batch:
            raise InputError(f"{len(seeds)} seeds for {batch} videos: give one a video")
        context = None if image is None else self._encode_image(image, batch, height, width)
        context_frames = 0 if context is None else context.shape[1]
        blocks, latent_frames = None, None
        if num_frames is not None:
            latent_frames = self.latent_frames(num_frames)
            blocks = num_blocks(latent_frames - context_frames, frames_per_block)
        state = self.new_memory(batch, height, width, latent_frames, memory or MemoryConfig())
        given = {TEXT: prompt_embeds.to(device, self.transformer.dtype)}
        text = self.transformer.embed_text(given[TEXT])
        if context is not None:
            given[GIVEN] = context
            for start in range(0, context_frames, frames_per_block):
                remember_block(self.flow_model, context[:, start : start + frames_per_block], text, state, start)
        noise = SeededNoise(seeds, (frames_per_block, self.transformer.config.in_dim, *size), device)
        generated = rollout(
            self.flow_model, self.sampler, noise, text, state, blocks, context_frames, self.config.context_noise, phase
        )
        decode = BlockDecoder(self.wan_vae, size, self._side, context, given, phase, lockstep)
        if lockstep is not None:
            generated = lockstep.blocks(iter(generated))
        finish = lockstep.together(decode) if lockstep is not None and decode.divided else decode
        leads = lockstep is None or lockstep.leads
        for block in finished(finish, generated, device):
            broken = block.finite.first_broken() if leads else None
            if broken is not None:
                raise NonFiniteBlockError(block.index, broken)
            block.frames_BTHWC.join()
            if leads:
                yield block

    def _encode_image(self, image: Picture | Sequence[Picture], batch: int, height: int, width: int) -> Tensor:
        """Latents [B, F, C, h, w] of the frames to start with; see `stream`."""
        given_BTCHW = first_frames(image, batch, height, width, self.wan_vae.temporal_compression)
        encoded = self.wan_vae.encode(given_BTCHW.to(self.wan_vae.device, self.wan_vae.dtype))
        return encoded.to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        *,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        **options: Any,
    ) -> VideoOutput:
        """Generate a whole video; see `stream` for the arguments, and `VideoOutput` for output types."""
        if output_type not in ("pt", "np", "pil", "latent"):
            raise InputError(f"unknown output_type {output_type!r}: give pt, np, pil or latent")
        pixels, latents = [], []
        with self.progress_bar(total=num_frames) as bar:
            for block in self.stream(prompt, num_frames, height, width, generator=generator, **options):
                # Frames wait on the CPU, so that the GPU's memory does not grow with the video.
                pixels.append(block.pixels_BTCHW.float().cpu())
                latents.append(block.latents_BFCHW)
                bar.update(block.pixels_BTCHW.shape[1])
        if output_type == "latent":
            return VideoOutput(torch.cat(latents, dim=1))
        processor = VideoProcessor(vae_scale_factor=self.wan_vae.spatial_compression)
        return VideoOutput(processor.postprocess_video(torch.cat(pixels, dim=1).transpose(1, 2), output_type))

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Let `backend` compute all softmax attention of the transformer."""
        self.transformer.use_attention_backend(backend)
