"""Floating-point operations that the model asks for, counted from its shapes; a multiply-add is two.

Counted is the mathematics, not what an implementation happens to do: matrix products of the linear layers, attention
over the keys that are there, reads of states, and their writes as the recurrence has it (a product with the state and a
rank-one update a token). Adapters count as products of rank r on the state branch and as merged on feed-forwards.
Elementwise work, the text's keys and values (once a video) and the VAE are not counted.
"""

from dataclasses import dataclass

from arl2.model import HybridWanModel


@dataclass(frozen=True)
class Flops:
    """Operations by kind."""

    linear: int = 0
    attention: int = 0
    state: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention, self.state + other.state)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.linear * times, self.attention * times, self.state * times)

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.state


def pass_flops(model: HybridWanModel, frames: int, tokens: int, keys: int, remember: bool) -> Flops:
    """One pass over one block.

    Args:
        model: only its shapes are used.
        frames, tokens: of the block.
        keys: tokens that a softmax layer attends to, the block's own included.
        remember: whether it is the clean pass, which needs only keys and values of the last layer.
    """
    config, hybrid = model.config, set(model.hybrid.layers)
    dim, last = config.dim, config.num_layers - 1
    total = ends_flops(model, frames, tokens, remember)
    for layer in range(config.num_layers):
        attends = not (remember and layer == last)
        if layer in hybrid:
            total += hybrid_flops(model, tokens, attends, remember)
        else:
            total += Flops(
                linear=2 * tokens * dim * dim * (4 if attends else 2),
                attention=4 * tokens * keys * dim if attends else 0,
            )
        if attends:
            total += Flops(
                linear=2 * tokens * dim * (2 * dim + 2 * config.ffn_dim),
                attention=4 * tokens * config.text_len * dim,
            )
    return total


def ends_flops(model: HybridWanModel, frames: int, tokens: int, remember: bool) -> Flops:
    """What of a pass lies outside of the blocks; see `pass_flops`."""
    config, dim = model.config, model.config.dim
    patch = model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
    ends = config.in_dim * patch + (0 if remember else config.out_dim * patch)
    time = frames * (config.freq_dim * dim + dim * dim + dim * 6 * dim)
    return Flops(linear=2 * (tokens * dim * ends + time))


def hybrid_flops(model: HybridWanModel, tokens: int, attends: bool, remember: bool) -> Flops:
    """Self-attention of one hybrid layer, which attends or remembers or both."""
    dim, heads, head_dim = model.config.dim, model.config.num_heads, model.head_dim
    adapter = 2 * dim * (model.hybrid.lora_rank or 0)
    total = Flops(linear=2 * tokens * dim * 2 * dim)  # k and v
    if attends:
        branch = 2 * dim * dim + heads * dim + adapter + dim * head_dim  # q and o, gate, Δ_q, φ_q
        total += Flops(2 * tokens * branch, 4 * tokens * tokens * dim, 2 * tokens * dim * head_dim)
    if remember:
        branch = 2 * heads * dim + 2 * adapter + 2 * dim * head_dim  # a and b, Δ_k and Δ_v, φ_k and φ_v
        total += Flops(linear=2 * tokens * branch, state=4 * tokens * dim * head_dim)
    return total


def rollout_flops(
    model: HybridWanModel, frames_per_block: int, tokens: int, window: int | None, steps: int, blocks: int
) -> Flops:
    """A whole video; its last block is not remembered.

    Args:
        model: only its shapes are used.
        frames_per_block, tokens: of a block.
        window: most tokens that a softmax layer sees; None for all.
        steps: denoising steps.
        blocks: of the video.
    """
    total = Flops()
    for block in range(blocks):
        keys = (block + 1) * tokens
        keys = keys if window is None else min(keys, window)
        total += pass_flops(model, frames_per_block, tokens, keys, remember=False) * steps
        if block + 1 < blocks:
            total += pass_flops(model, frames_per_block, tokens, keys, remember=True)
    return total
