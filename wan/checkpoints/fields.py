"""The settings that a transformer's config.json may hold, in every layout, with their types and ranges."""

from typing import Any

from wan.checkpoints.configs import Field, flag, list_of, one_of, optional, real, settings_of, whole

MAX_LAYERS, MAX_WIDTH, MAX_TEXT_LEN = 256, 1 << 17, 1 << 14
"""Sizes beyond which a config.json is no transformer's: the largest released one has 40 layers of 13,824 channels."""

WIDTH = whole(1, MAX_WIDTH)
SIZES: dict[str, Field] = {
    "patch_size": list_of(whole(1, 64), length=3),
    "text_len": whole(1, MAX_TEXT_LEN),
    **dict.fromkeys(("in_dim", "dim", "ffn_dim", "text_dim", "out_dim"), WIDTH),
    "freq_dim": whole(2, MAX_WIDTH),
    "num_heads": whole(1, MAX_WIDTH),
    "num_layers": whole(1, MAX_LAYERS),
    "qk_norm": flag(),
    "cross_attn_norm": flag(),
    "eps": real(0, 0.1, above=True),
    "model_type": one_of("t2v"),
}
"""Arguments of `wan.model.CausalWanModel`."""
LORA_ALPHA = real(0, 1e6, above=True)
HYBRID: dict[str, Field] = {
    "hybrid_layers": list_of(whole(0, MAX_LAYERS - 1)),
    "lora_rank": optional(whole(1, MAX_WIDTH)),
    "lora_alpha": LORA_ALPHA,
    "ffn_lora": one_of("none", "hybrid", "all"),
}
"""Settings that only hybrid models have."""
TRAINED_MEMORY = "trained_memory"
MEMORY: dict[str, Field] = {
    "window_frames": optional(whole(1, 1 << 24)),
    "sink_frames": whole(0, 1 << 24),
    "num_frames": optional(whole(1, 1 << 24)),
}
"""The memory of the softmax layers in training, see `arl2.trained_memory.TrainedMemory`."""
OPTIONAL_HYBRID: dict[str, Field] = {TRAINED_MEMORY: optional(settings_of(MEMORY))}
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
# Settings of other programs' classes, which must say that what they stand for is not used.
NATIVE_NEUTRAL: dict[str, Field] = {
    "window_size": list_of(one_of(-1), length=2),
    "local_attn_size": one_of(-1),
    "sink_size": one_of(0),
}
DIFFUSERS: dict[str, Field] = {
    "patch_size": SIZES["patch_size"],
    **dict.fromkeys(("in_channels", "out_channels", "attention_head_dim", "ffn_dim", "text_dim"), WIDTH),
    "freq_dim": SIZES["freq_dim"],
    "num_attention_heads": SIZES["num_heads"],
    "num_layers": SIZES["num_layers"],
    "cross_attn_norm": flag(),
    "qk_norm": one_of("rms_norm_across_heads", None),
    "eps": SIZES["eps"],
    "image_dim": one_of(None),
    "added_kv_proj_dim": one_of(None),
    "pos_embed_seq_len": one_of(None),
    "rope_max_seq_len": whole(1, 1 << 20),
}
DIFFUSERS_OPTIONAL = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "rope_max_seq_len")
