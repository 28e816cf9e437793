"""Wan 2.1 as a causal, block-autoregressive video diffusion transformer: the backbone and its parts."""
