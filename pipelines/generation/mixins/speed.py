"""The fast form of a pipeline's transformer: when it is made, undone and made anew."""

import logging
import time
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from arl2.inference.blocks import require_divisible
from arl2.inference.cuda_graphs import GraphedModel
from arl2.inference.memory_pool import MemoryPool
from arl2.inference.model import InferenceModel
from arl2.inference.parallel.factory import Exchange, new_sequence_parallel, new_sharded_weights
from arl2.inference.parallel.sequence_parallel import SequenceParallel, ShardedWeights
from arl2.lora import LoRALinear
from arl2.rollout import predict_flow, remember_block
from pipelines.config import MemoryConfig, SpeedConfig
from pipelines.feasibility import check_speed
from pipelines.generation.mixins.placement import PlacementMixin
from pipelines.generation.streaming import SideStream
from pipelines.provenance import part_fingerprint
from wan.memory import Memory
from wan.model import FlowModel
from wan.utils.errors import InputError
from wan.vae.tiny import load_tiny_decoder

log = logging.getLogger(__name__)
Weights = dict[str, tuple[int, int]]


class SpeedMixin(PlacementMixin):
    """Adds the fast form of the transformer to a pipeline.

    The first call on a CUDA device makes it, unless `optimizes_by_default` is off, parts are offloaded or the weights
    are quantised. It is undone by whatever changes the weights (`to`, LoRAs, another transformer, values written into
    parameters), and made anew before the next pass.

    Attributes:
        optimizes_by_default: whether a call on a CUDA device calls `optimize_for_inference` first, with the defaults of
            `SpeedConfig`, if nobody has called it.
        warm_up_seconds: duration of the last `warm_up`.
        unmerged_fingerprint: of the transformer before its adapters were merged for the fast form; None while none are.
    """

    optimizes_by_default: bool = True
    warm_up_seconds: float | None = None
    unmerged_fingerprint: str | None = None
    _speed: SpeedConfig | None = None
    _fast: FlowModel | None = None
    _pool: MemoryPool | None = None
    _side: SideStream | None = None
    _sharded: ShardedWeights | None = None
    _form_is_made: bool = False
    _weights_of_form: Weights | None = None
    _merged: tuple[str, ...] = ()
    _undo: ExitStack

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
            InputError: the heads do not divide over the processes, the GPUs cannot exchange in this way, the VAE has a
                device of its own, or hybrid layers have states that cannot be divided.
        """
        require_divisible(self.transformer.hybrid.state)
        self.require_one_device("parallelize, with which every process decodes a part of each frame,")
        self._parallel = new_sequence_parallel(self.transformer.config.num_heads, self.transformer.device, exchange)
        self.transformer.head_shards = self._parallel.size

    def optimize_for_inference(self, speed: SpeedConfig | None = None) -> None:
        """Compute the transformer's passes the fast way from now on, as its weights and switches are now.

        Feed-forward adapters are merged meanwhile. A later call undoes what this one did, first of all. Call it when
        everything is on its device. On a CUDA device the first call of the pipeline does so by itself.

        Args:
            speed: what to switch on, by default what pays on the device; if nothing of the transformer, the plain one
                computes.

        Raises:
            InputError: the device cannot, parts are offloaded, or the weights are quantised.
        """
        given = SpeedConfig() if speed is None else speed
        device, config = self.transformer.device, self.transformer.config
        speed = given.on(device, self.transformer.dtype)
        check_speed(speed, device, self.transformer.dtype, config.dim, config.ffn_dim)
        parallel = self._parallel
        is_fast = bool(speed.compile or speed.cuda_graphs or speed.fp8 or speed.kernels or parallel is not None)
        if is_fast and (reason := self.why_plain()) is not None:
            raise InputError(f"the fast form of the transformer needs its weights as they are: {reason}")
        self.undo_fast_form()
        self._speed = given
        if speed.vae_device is not None:
            self._undo.callback(self.move_vae(speed.vae_on(device)))
        self._side = SideStream(device) if speed.overlap_decoding and not self.vae_is_apart else None
        self.wan_vae.fast, self.wan_vae.tiny = speed.fast_vae, None
        if speed.tiny_vae is not None:
            self.wan_vae.tiny = load_tiny_decoder(
                speed.tiny_vae, self.wan_vae.latent_channels, dtype=self.wan_vae.dtype, device=self.wan_vae.device
            )
        self._sharded = new_sharded_weights(parallel, device) if speed.shard_weights else None
        if is_fast:
            self._make_fast_form(speed, parallel)
        self._form_is_made, self._weights_of_form = True, weights_state(self.transformer) if is_fast else None

    def _make_fast_form(self, speed: SpeedConfig, parallel: SequenceParallel | None) -> None:
        model, device = self.transformer, self.transformer.device
        if any(isinstance(part, LoRALinear) for block in model.layers() for part in block.ffn):
            self.unmerged_fingerprint = part_fingerprint(model)
        # On the CPU the adapters' layers cost a GPU no memory, and come back exactly.
        adapters = model.merge_ffn_lora(keep_on=torch.device("cpu"))
        self._merged = tuple(f"blocks.{block}.ffn.{place}." for block, place in adapters.layers)
        self._undo.callback(model.unmerge_ffn_lora, adapters)
        fast = InferenceModel(model, bool(speed.compile), speed.fp8, bool(speed.kernels), parallel, self._sharded)
        self._undo.callback(fast.release)
        self._pool = MemoryPool(model)
        if not speed.cuda_graphs or not (parallel is None or parallel.can_be_recorded):
            self._fast = fast
            return
        # A kernel of ours costs the CPU more to launch than one of the compiler's: 29 fps where a pass is not recorded.
        launched = fast.without_kernels() if speed.kernels and speed.compile else fast
        self._fast = GraphedModel(fast, device, launched)

    def leave_fast_form(self) -> None:
        """Undo what `optimize_for_inference` did to the transformer: its own passes are computed from now on."""
        self.undo_fast_form()
        self._speed, self.optimizes_by_default = None, False

    def undo_fast_form(self) -> None:
        """As `leave_fast_form`, until the next pass."""
        self._fast = self._pool = self._weights_of_form = self.unmerged_fingerprint = None
        self._form_is_made, self._merged = False, ()
        self._undo.close()

    def ready_form(self) -> None:
        """Make the form of the transformer that the next video takes, if it is not there or was made of other weights.

        Raises:
            InputError: values were written into a layer whose adapters are merged meanwhile.
        """
        if self._speed is None:
            wanted = self.optimizes_by_default and self._takes_fast_form_by_default() and self.why_plain() is None
            if wanted:
                log.info("the transformer computes in its fast form: leave_fast_form() to compute plainly")
                self.optimize_for_inference()
            return
        if self._form_is_made and self._weights_of_form in (None, found := weights_state(self.transformer)):
            return
        if self._form_is_made:
            before = self._weights_of_form or {}
            changed = [name for name, value in found.items() if before.get(name, value) != value]
            if any(name.startswith(self._merged) for name in changed if self._merged):
                raise InputError(
                    "weights of a feed-forward were changed while its adapters were merged into it: call "
                    "leave_fast_form() before you change weights, and optimize_for_inference() after it"
                )
        self.optimize_for_inference(self._speed)

    def _takes_fast_form_by_default(self) -> bool:
        return self.transformer.device.type == "cuda"

    def new_memory(
        self, batch_size: int, height: int, width: int, latent_frames: int | None, memory: MemoryConfig
    ) -> Memory:
        """See `CausalVideoPipeline`."""
        raise NotImplementedError

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See `CausalVideoPipeline`."""
        raise NotImplementedError

    @torch.no_grad()
    def warm_up(self, height: int, width: int, memory: MemoryConfig, batch_size: int = 1) -> float:
        """Run two blocks on noise, so that kernels are compiled, tuned and loaded.

        Over a full memory passes that are recorded and those that are not have kernels of their own: the second block
        has some of both.

        Returns:
            seconds that it took, which `warm_up_seconds` keeps.
        """
        self.ready_form()
        begin, config, device = time.perf_counter(), self.transformer.config, self._execution_device
        size = self.latent_size(height, width)
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


def weights_state(model: nn.Module) -> Weights:
    """Where every parameter lies and how often it was written to: other after every change that PyTorch can see."""
    return {name: (value.data_ptr(), _version(value)) for name, value in model.named_parameters()}


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version
