"""Where the parts of a pipeline are: all on one device, the VAE on one of its own, or on the CPU between uses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from arl2.inference.parallel.sequence_parallel import SequenceParallel
from arl2.model import HybridWanModel
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE


class PlacementMixin(DiffusionPipeline):
    """Adds a device for the VAE alone to a pipeline, and checks that it agrees with diffusers' offloading."""

    transformer: HybridWanModel
    wan_vae: WanVAE
    _parallel: SequenceParallel | None

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        device: torch.device = self.transformer.device
        return device

    @property
    def vae_is_apart(self) -> bool:
        """Whether the VAE has a device of its own: then pixels are there, and latents are copied."""
        return self.wan_vae.device != self.device

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            InputError: the VAE has a device of its own.
        """
        self.require_one_device("enable_model_cpu_offload")
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            InputError: the VAE has a device of its own.
        """
        self.require_one_device("enable_sequential_cpu_offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def require_one_device(self, what: str) -> None:
        """Check that all parts are on one device.

        Args:
            what: needs it.

        Raises:
            InputError: the VAE has a device of its own.
        """
        if self.vae_is_apart:
            raise InputError(
                f"{what} needs all parts on {self.device}, the VAE is on {self.wan_vae.device}: leave vae_device out"
            )

    def move_vae(self, device: torch.device) -> Callable[[], object]:
        """Move the VAE to a device of its own.

        Returns:
            what moves it back.

        Raises:
            InputError: processes compute videos together, or parts are offloaded.
        """
        home = self.wan_vae.device
        if device == home:
            return lambda: None
        if self._parallel is not None or hasattr(self.vae, "_hf_hook"):
            raise InputError("vae_device goes neither with parallelize nor with CPU offloading: leave it out")
        self.wan_vae.to(device)
        return partial(self.wan_vae.to, home)
