"""Patches of latents to tokens."""

from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbedding(nn.Conv3d):
    """Projection of patches to tokens, stored as the convolution that it is on latents."""

    def forward(self, patches_BLP: Tensor) -> Tensor:
        """Tokens [B, L, dim] of patches [B, L, channels of a patch], channels slowest."""
        return F.linear(patches_BLP, self.weight.flatten(1), self.bias)
