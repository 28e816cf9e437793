"""The settings that a transformer's config.json may hold, in every layout, with their types and ranges."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from wan.utils.ranges import Bounds, Length, declarations

MAX_LAYERS, MAX_WIDTH, MAX_TEXT_LEN = 256, 1 << 17, 1 << 14
"""Sizes beyond which a config.json is no transformer's: the largest released one has 40 layers of 13,824 channels."""

Width = Annotated[int, Bounds(1, MAX_WIDTH)]
PatchSide = Annotated[int, Bounds(1, 64)]
SIZES: dict[str, Any] = {
    "patch_size": tuple[PatchSide, PatchSide, PatchSide],
    "text_len": Annotated[int, Bounds(1, MAX_TEXT_LEN)],
    **dict.fromkeys(("in_dim", "dim", "ffn_dim", "text_dim", "out_dim"), Width),
    "freq_dim": Annotated[int, Bounds(2, MAX_WIDTH)],
    "num_heads": Annotated[int, Bounds(1, MAX_WIDTH)],
    "num_layers": Annotated[int, Bounds(1, MAX_LAYERS)],
    "qk_norm": bool,
    "cross_attn_norm": bool,
    "eps": Annotated[float, Bounds(0, 0.1, above=True)],
    "model_type": Literal["t2v"],
}
"""Arguments of `wan.model.CausalWanModel`."""
MIN_ALPHA = 1e-6
"""The smallest alpha: of much smaller ones the scale, which is alpha by rank, rounds to nothing."""
LoRAAlpha = Annotated[float, Bounds(MIN_ALPHA, 10**6)]
HYBRID: dict[str, Any] = {
    "hybrid_layers": Annotated[list[Annotated[int, Bounds(0, MAX_LAYERS - 1)]], Length(0, 4096)],
    "lora_rank": Annotated[int, Bounds(1, MAX_WIDTH)] | None,
    "lora_alpha": LoRAAlpha,
    "ffn_lora": Literal["none", "hybrid", "all"],
}
"""Settings that only hybrid models have."""
TRAINED_MEMORY = "trained_memory"
UNTRAINED = "untrained_layers"
"""Of a conversion: the layers whose new parameters no training has met."""


@dataclass
class MemoryRecord:
    """The memory of the softmax layers in training, see `arl2.trained_memory.TrainedMemory`."""

    window_frames: Annotated[int, Bounds(1, 1 << 24)] | None
    sink_frames: Annotated[int, Bounds(0, 1 << 24)]
    num_frames: Annotated[int, Bounds(1, 1 << 24)] | None


MEMORY = declarations(MemoryRecord)
STATE_VARIANT = "state"
"""Of a model whose states are not the paper's: what differs."""
RotationPeriod = Annotated[int, Bounds(1, 1 << 24)]
RotationRate = Annotated[float, Bounds(0, 1, above=True, below=True)]
TokensPerBlock = Annotated[int, Bounds(1, 1 << 24)]
ValueExpansion = Annotated[int, Bounds(1, 16)]
NumStates = Annotated[int, Bounds(1, 2)]
LocalFrames = Annotated[int, Bounds(0, 1 << 16)]


@dataclass
class StateRecord:
    """Variants of the recurrent state, see `arl2.state_settings.StateSettings`."""

    rotation: Literal["absolute", "none", "spatial", "wrapped", "slow"] = "absolute"
    rotation_period: RotationPeriod | None = None
    rotation_rate: RotationRate | None = None
    decay: Literal["paper", "slow"] = "paper"
    decay_block_tokens: TokensPerBlock | None = None
    value_expansion: ValueExpansion = 1
    num_states: NumStates = 1
    local_frames: LocalFrames = 0
    gate: Literal["headwise", "none"] = "headwise"
    reads: Literal["block", "token"] = "block"
    writes: Literal["clean", "noisy"] = "clean"
    rule: str = "gated_delta"


OPTIONAL_HYBRID: dict[str, Any] = {
    TRAINED_MEMORY: MemoryRecord | None,
    UNTRAINED: HYBRID["hybrid_layers"] | None,
    STATE_VARIANT: StateRecord | None,
}
"""Settings that a hybrid model may leave out."""
RELEASED: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "in_dim": 16,
    "out_dim": 16,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
}
"""Values that all released models share, and leave out of lists of sizes."""
NATIVE_TEXT_DIM = 4096
WAN_22_CHANNELS = 48
"""Latent channels of Wan 2.2 5B, whose VAE compresses 16 times: no other model of this family has as many."""
# Settings of other programs' classes, which must say that what they stand for is not used.
NATIVE_NEUTRAL: dict[str, Any] = {
    "window_size": tuple[Literal[-1], Literal[-1]],
    "local_attn_size": Literal[-1],
    "sink_size": Literal[0],
}
DIFFUSERS: dict[str, Any] = {
    "patch_size": SIZES["patch_size"],
    **dict.fromkeys(("in_channels", "out_channels", "attention_head_dim", "ffn_dim", "text_dim"), Width),
    "freq_dim": SIZES["freq_dim"],
    "num_attention_heads": SIZES["num_heads"],
    "num_layers": SIZES["num_layers"],
    "cross_attn_norm": bool,
    "qk_norm": Literal["rms_norm_across_heads", None],
    "eps": SIZES["eps"],
    "image_dim": Literal[None],
    "added_kv_proj_dim": Literal[None],
    "pos_embed_seq_len": Literal[None],
    "rope_max_seq_len": Annotated[int, Bounds(1, 1 << 20)],
}
DIFFUSERS_OPTIONAL = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "rope_max_seq_len")
