"""Sizes of the diffusion transformer, as data.

Each entry is the keyword arguments of `wan.model.CausalWanModel`; the names are those of the
`config.json` in a Wan 2.1 release.
"""

from typing import TypedDict

from wan.utils.errors import InputError


class WanSize(TypedDict):
    """What distinguishes one Wan 2.1 text-to-video transformer from another."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_dim: int
    text_len: int


WAN_SIZES: dict[str, WanSize] = {
    "1.3B": WanSize(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, text_len=512),
    "14B": WanSize(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256, text_dim=4096, text_len=512),
    "toy": WanSize(dim=192, ffn_dim=768, num_heads=3, num_layers=8, freq_dim=64, text_dim=64, text_len=32),
}


def wan_size(name: str) -> WanSize:
    """The sizes called `name`.

    Raises:
        InputError: there is no such size.
    """
    if name not in WAN_SIZES:
        raise InputError(f"no model size {name!r}: choose one of {', '.join(WAN_SIZES)}")
    return WAN_SIZES[name]
