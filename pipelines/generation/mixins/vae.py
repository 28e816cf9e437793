"""Decoding with less memory, under the names that diffusers' pipelines have for it."""

from pipelines.generation.mixins.placement import PlacementMixin
from wan.utils.errors import InputError
from wan.utils.ranges import typed


class DecodingMixin(PlacementMixin):
    """Adds tiling and slicing of the decoder to a pipeline. The VAE's own switches are set, and count as well."""

    def enable_vae_tiling(self, tile_sample_min_height: int | None = None) -> None:
        """Decode the rows of a frame in bands, one after the other: the same frames up to rounding, without seams.

        A band computes a few rows of its neighbours too, so that nothing is blended; columns are not divided.

        Args:
            tile_sample_min_height: pixels of a band at most, 256 by default.

        Raises:
            InputError: bands of less than a latent's rows, or a tiny decoder, which decodes whole frames.
        """
        least = self.wan_vae.spatial_compression
        if tile_sample_min_height is not None and typed(int, tile_sample_min_height, "tile_sample_min_height") < least:
            raise InputError(f"tile_sample_min_height {tile_sample_min_height} is too small: give at least {least}")
        if self.wan_vae.tiny is not None:
            raise InputError(
                "enable_vae_tiling does not go with a tiny decoder, which needs little memory: leave it out"
            )
        self.vae.enable_tiling(tile_sample_min_height=tile_sample_min_height)

    def disable_vae_tiling(self) -> None:
        """Decode whole frames again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode the videos of a batch one after the other."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the videos of a batch together again."""
        self.vae.disable_slicing()
