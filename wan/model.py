"""The Wan 2.1 diffusion transformer as a causal model over blocks of latent frames.

Shapes: B videos, F latent frames of a block, C channels, L = F·height·width tokens, D model channels.
Parameter names are those of the Wan 2.1 release. Source: Wan 2.1, made causal by Causal Forcing (arXiv 2602.02214).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wan.flow import timestep_embedding
from wan.memory import KVUpdate, KVView, LayerMemory, Memory, MemorySpec
from wan.new_memory import new_kv_memory
from wan.ops.attention import AttentionBackend, attention
from wan.ops.dispatch import norm_by_kernel
from wan.ops.modulation import layer_norm, modulate, plus_gated
from wan.ops.patches import PatchEmbedding
from wan.ops.rope import Rotary, rotary_angles, rotate
from wan.parallel import BlocksView, MaskedView, ParallelLayout
from wan.utils.errors import CheckpointError, InputError

TextKV = list[tuple[Tensor, Tensor]]
"""Keys and values of the text for every layer, each [B, text_len, heads, head dim]."""


class RMSNorm(nn.Module):
    """RMS norm over the last axis in float32, times a weight in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        by_kernel = norm_by_kernel(x, self.weight, 1 / x.shape[-1], self.eps)
        if by_kernel is not None:
            return by_kernel
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class AttentionLayer(nn.Module):
    """Projections, norms and backend common to self-attention and cross-attention."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.backend = AttentionBackend.AUTO
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x_BLD: Tensor) -> Tensor:
        """View of [B, L, dim] as [B, L, heads, head dim]."""
        return x_BLD.unflatten(-1, (self.num_heads, self.head_dim))

    def rotated(self, projected_BLD: Tensor, norm: nn.Module, rotary: Rotary) -> Tensor:
        """Queries or keys of attention from their projection: normed and rotated, [B, L, heads, head dim]."""
        return rotate(self.heads(norm(projected_BLD)), rotary)


class SelfAttention(AttentionLayer):
    """Softmax attention of a block's tokens over its memory and the block itself."""

    def new_memory(self, spec: MemorySpec) -> LayerMemory:
        """Empty memory of this layer's kind."""
        return new_kv_memory(spec, self.num_heads // spec.head_shards, self.head_dim)

    def parallel_view(self, layout: ParallelLayout, past: Any = None) -> Any:
        """View for a forward over all blocks of a sequence at once.

        Args:
            layout: of the sequence.
            past: view of the memory of the blocks before it; None if there are none.
        """
        return layout.view(past)

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, view: KVView | MaskedView | BlocksView, *, attend: bool, remember: bool
    ) -> tuple[Tensor | None, KVUpdate | None]:
        """Attend, or return the update of these tokens for the memory, or both; the memory is not changed.

        Args:
            x_BLD: normed and modulated tokens.
            rotary: rotation of these tokens.
            view: view of earlier blocks, or visibility between the blocks of the sequence.
            attend: whether to compute the output.
            remember: whether to compute the update.

        Returns:
            output [B, L, dim] or None, update or None.
        """
        k = self.rotated(self.k(x_BLD), self.norm_k, rotary)
        v = self.heads(self.v(x_BLD))
        update = None
        if remember:
            clean = view.layout.clean_tokens if isinstance(view, MaskedView | BlocksView) else None
            update = KVUpdate(k[:, :clean], v[:, :clean])
        if not attend:
            return None, update
        q = self.rotated(self.q(x_BLD), self.norm_q, rotary)
        if isinstance(view, BlocksView):
            return self.o(view.attention(q, k, v, self.backend).flatten(2)), update
        keys, values, mask = view.with_block(k, v)
        return self.o(attention(q, keys, values, mask_LM=mask, backend=self.backend).flatten(2)), update


class CrossAttention(AttentionLayer):
    """Attention of the tokens over the text, padding included, as in Wan 2.1."""

    def keys_values(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each [B, T, heads, head dim]; constant over a video."""
        return self.heads(self.norm_k(self.k(text_BTD))), self.heads(self.v(text_BTD))

    def forward(self, x_BLD: Tensor, text_kv: tuple[Tensor, Tensor]) -> Tensor:
        q = self.heads(self.norm_q(self.q(x_BLD)))
        return self.o(attention(q, *text_kv, backend=self.backend).flatten(2))


class Block(nn.Module):
    """Block of self-attention, cross-attention and feed-forward; the timestep modulates the first and the last."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn: SelfAttention = SelfAttention(dim, num_heads, qk_norm, eps)
        self.norm3 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BLD: Tensor,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: Any,
        text_kv: tuple[Tensor, Tensor],
        *,
        attend: bool,
        remember: bool,
    ) -> tuple[Tensor, Any]:
        """Run one pass over a block's tokens; see `SelfAttention.forward` for `attend` and `remember`.

        Returns:
            the tokens for the next layer (the input unchanged without `attend`), and the update or None.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None] + time_BF6D).unbind(dim=2)
        dtype = self.modulation.dtype
        tokens = modulate(layer_norm(self.norm1, x_BLD, dtype), shift1, scale1)
        mixed, update = self.self_attn(tokens, rotary, view, attend=attend, remember=remember)
        if mixed is None:
            return x_BLD, update
        x = plus_gated(x_BLD, mixed, gate1)
        x = x + self.cross_attn(layer_norm(self.norm3, x, dtype), text_kv)
        hidden = self.ffn(modulate(layer_norm(self.norm2, x, dtype), shift2, scale2))
        return plus_gated(x, hidden, gate2), update


class Head(nn.Module):
    """Output head: norm, modulation and projection to patches."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x_BLD: Tensor, time_BFD: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + time_BFD[:, :, None]).unbind(dim=2)
        return self.head(modulate(layer_norm(self.norm, x_BLD, self.modulation.dtype), shift, scale))


class PassOutput(NamedTuple):
    """Result of one pass over a block.

    Attributes:
        flow: predicted velocity [B, F, C, H, W]; None from a pass that remembers.
        updates: memory updates, one per layer; None from a pass that only attends.
    """

    flow: Tensor | None
    updates: list[Any] | None


class Embedded(NamedTuple):
    """Inputs of all layers.

    Attributes:
        tokens_BLD: embedded patches of the latents.
        rotary: rotation of every token.
        time_BFD: embedding of each frame's timestep, for the head.
        time_BF6D: modulation of the blocks by each frame's timestep, [B, F, 6, D].
    """

    tokens_BLD: Tensor
    rotary: Rotary
    time_BFD: Tensor
    time_BF6D: Tensor


class FlowModel(Protocol):
    """Interface of a model that can be rolled out: `CausalWanModel` and its faster forms."""

    def __call__(
        self,
        latents_BFCHW: Tensor,
        timesteps_BF: Tensor,
        text: TextKV,
        views: Sequence[Any],
        frames_F: Tensor,
        remember: bool = False,
    ) -> PassOutput:
        """See `CausalWanModel.forward`."""

    def tokens_per_frame(self, height: int, width: int) -> int:
        """See `CausalWanModel.tokens_per_frame`."""


class CausalWanModel(ModelMixin, ConfigMixin):
    """Wan 2.1's transformer, run block by block over a memory that the caller owns.

    Args:
        patch_size: (frames, rows, columns) of latent that make one token.
        text_len, text_dim: tokens and channels of the text embedding.
        in_dim, out_dim: latent channels in and out.
        dim, ffn_dim, freq_dim: channels of the model, its feed-forward and its timestep sinusoids.
        num_heads, num_layers: sizes; see `wan.config.WAN_SIZES`.
        qk_norm, cross_attn_norm: whether these norms exist; every released Wan 2.1 model has them.
        eps: epsilon of all norms.
        model_type: only "t2v", text to video.

    Attributes:
        head_shards: ranks that the heads of memories made from now on are divided over.

    Raises:
        InputError: the sizes are inconsistent.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers declares it as an instance attribute)

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 1536,
        ffn_dim: int = 8960,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 12,
        num_layers: int = 30,
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        model_type: str = "t2v",
    ) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 2:
            raise InputError(f"dim {dim} does not divide into {num_heads} heads of an even number of channels")
        if model_type != "t2v" or patch_size[0] != 1:
            raise InputError(
                f"model_type {model_type!r} with patches of {patch_size[0]} frames: only t2v with 1 is built"
            )
        frames, rows, columns = patch_size
        self.patch_size = (frames, rows, columns)
        self.head_dim = dim // num_heads
        self.freq_dim = freq_dim
        patch_channels = out_dim * patch_size[0] * patch_size[1] * patch_size[2]
        self.patch_embedding = PatchEmbedding(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.head = Head(dim, patch_channels, eps)
        self.gradient_checkpointing = False
        self.head_shards = 1

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as in diffusers, except that missing or unexpected names are an error."""
        kwargs["output_loading_info"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: {problem.replace('_', ' ')}, first {info[problem][0]}: "
                    f"the folder does not hold a {cls.__name__}"
                )
        return model

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize all weights for training from scratch; the output is zero at first."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if name.startswith(("text_embedding.", "time_embedding.")) and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.head.weight)

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Use `backend` for all softmax attention."""
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                module.backend = backend

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Number of tokens of one latent frame of `height` × `width`.

        Raises:
            InputError: the latent does not divide into patches.
        """
        _, rows, columns = self.patch_size
        if height % rows or width % columns:
            raise InputError(f"a latent of {height}×{width} does not divide into patches of {rows}×{columns}")
        return (height // rows) * (width // columns)

    def new_memory(self, spec: MemorySpec) -> Memory:
        """Empty memory: one object per layer, of the kind that the layer reads."""
        return Memory([block.self_attn.new_memory(spec) for block in self.layers()])

    def memory_for(
        self,
        latents_BFCHW: Tensor,
        window_frames: int | None = None,
        sink_frames: int = 0,
        differentiable: bool = False,
        dtype: torch.dtype | None = None,
        sink_decay: float | None = None,
    ) -> Memory:
        """Empty memory for videos of the number, length and size of some latents, on their device.

        Args:
            latents_BFCHW: only their shape and device count.
            window_frames, sink_frames, differentiable, sink_decay: as in `MemorySpec`.
            dtype: of keys and values; None for that of the model.
        """
        batch, frames, _, height, width = latents_BFCHW.shape
        return self.new_memory(
            MemorySpec(
                batch_size=batch,
                tokens_per_frame=self.tokens_per_frame(height, width),
                device=latents_BFCHW.device,
                dtype=self.patch_embedding.weight.dtype if dtype is None else dtype,
                frames=frames,
                window_frames=window_frames,
                sink_frames=sink_frames,
                differentiable=differentiable,
                head_shards=self.head_shards,
                sink_decay=sink_decay,
            )
        )

    def memory_bytes(
        self,
        frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        window_frames: int | None = None,
        sink_frames: int = 0,
        sink_decay: float | None = None,
    ) -> int:
        """Bytes of all layers' memories of one video; nothing is allocated.

        Args:
            frames: latent frames that are remembered.
            height, width: of a latent frame.
            dtype: of keys and values.
            window_frames, sink_frames, sink_decay: as in `MemorySpec`.
        """
        latents = torch.empty(1, frames, self.config.in_dim, height, width, device="meta")
        return self.memory_for(latents, window_frames, sink_frames, dtype=dtype, sink_decay=sink_decay).num_bytes

    def parallel_views(self, layout: ParallelLayout, past: Sequence[Any] | None = None) -> list[Any]:
        """Views for a forward over all blocks of a sequence at once, one per layer; see `wan.teacher_forcing`.

        Args:
            layout: of the sequence.
            past: views of a memory of the blocks before it.
        """
        layers = self.layers()
        pairs = zip(layers, [None] * len(layers) if past is None else past, strict=True)
        return [block.self_attn.parallel_view(layout, view) for block, view in pairs]

    def layers(self) -> list[Block]:
        """Transformer blocks in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed_text(self, text_BTD: Tensor) -> TextKV:
        """Compute keys and values of a prompt for every layer; once per video is enough.

        Args:
            text_BTD: text encoder output [B, up to text_len, text_dim]; zero rows are added up to text_len.

        Raises:
            InputError: the shape does not fit.
        """
        missing = self.config.text_len - text_BTD.shape[1]
        if missing < 0 or text_BTD.shape[2] != self.config.text_dim:
            raise InputError(
                f"text embeddings of shape {tuple(text_BTD.shape)} do not fit: expected at most "
                f"{self.config.text_len} tokens of {self.config.text_dim} channels"
            )
        text = self.text_embedding(F.pad(text_BTD, (0, 0, 0, missing)))
        return [block.cross_attn.keys_values(text) for block in self.layers()]

    def embed(self, latents_BFCHW: Tensor, timesteps_BF: Tensor, frames_F: Tensor) -> Embedded:
        """Embed latents and timesteps; see `forward` for the arguments."""
        dtype, (_, rows, columns) = self.patch_embedding.weight.dtype, self.patch_size
        patches = rearrange(latents_BFCHW.to(dtype), "b f c (h r) (w s) -> b (f h w) (c r s)", r=rows, s=columns)
        tokens = self.patch_embedding(patches)
        height, width = latents_BFCHW.shape[-2:]
        rotary = self.rotary(frames_F, height // rows, width // columns)
        time_BFD = self.time_embedding(timestep_embedding(timesteps_BF, self.freq_dim).to(dtype))
        return Embedded(tokens, rotary, time_BFD, self.time_projection(time_BFD).unflatten(-1, (6, -1)))

    def rotary(self, frames_F: Tensor, height: int, width: int) -> Rotary:
        """Rotation of the tokens of latent frames with a grid of `height` × `width` tokens, for all layers."""
        return rotary_angles(frames_F, height, width, self.head_dim)

    def forward(
        self,
        latents_BFCHW: Tensor,
        timesteps_BF: Tensor,
        text: Tensor | TextKV,
        views: Sequence[Any],
        frames_F: Tensor,
        remember: bool = False,
        attend: bool | None = None,
    ) -> PassOutput:
        """Run one pass over a block; the memory behind `views` is not changed.

        Args:
            latents_BFCHW: noisy or clean latents of the block.
            timesteps_BF: timestep of every latent frame, 0 (clean) to 1000 (noise).
            text: text encoder output [B, T, text_dim], or the result of `embed_text`.
            views: each layer's view of earlier blocks, from `Memory.read`.
            frames_F: absolute index of every latent frame.
            remember: return memory updates.
            attend: return the flow; None for if not `remember`. Parts that updates do not need are skipped without it.

        Returns:
            flow, or updates for `Memory.commit`, or both.
        """
        attend = not remember if attend is None else attend
        x, rotary, time_BFD, time_BF6D = self.embed(latents_BFCHW, timesteps_BF, frames_F)
        text_kv = self.embed_text(text) if isinstance(text, Tensor) else text
        layers, updates = self.layers(), []
        for block, view, kv in zip(layers, views, text_kv, strict=True):
            run = partial(block, attend=attend or block is not layers[-1], remember=remember)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                run = partial(self._gradient_checkpointing_func, run)
            x, update = run(x, time_BF6D, rotary, view, kv)
            updates.append(update)
        flow = self.flow(x, time_BFD, *latents_BFCHW.shape[-2:]) if attend else None
        return PassOutput(flow, updates if remember else None)

    def flow(self, x_BLD: Tensor, time_BFD: Tensor, height: int, width: int) -> Tensor:
        """Velocity [B, F, C, height, width] from the tokens after the last layer."""
        return self.unpatchify(self.head(x_BLD, time_BFD), height, width)

    def unpatchify(self, patches_BLP: Tensor, height: int, width: int) -> Tensor:
        """Latents [B, F, C, height, width] from the patches of their tokens."""
        _, rows, columns = self.patch_size
        pattern = "b (f h w) (r s c) -> b f c (h r) (w s)"
        return rearrange(patches_BLP, pattern, h=height // rows, w=width // columns, r=rows, s=columns)
