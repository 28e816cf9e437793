"""Where the parts of a pipeline are: all on one device, the VAE on one of its own, or on the CPU between uses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKLWan, DiffusionPipeline

from arl2.inference.parallel.sequence_parallel import SequenceParallel
from arl2.model import HybridWanModel
from arl2.state_settings import NOISY_WRITES, Writes
from wan.utils.device import require_device
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE

GROUPS = "enable_group_offload"


class PlacementMixin(DiffusionPipeline):
    """Adds a device for the VAE alone to a pipeline, and diffusers' ways of offloading parts to the CPU.

    A video is decoded block by block beside its denoising: so the VAE, the smallest part, stays on the GPU, whichever
    way the others are offloaded. The transformer computes plainly then, since its fast form keeps the weights.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vae"]
    transformer: HybridWanModel
    vae: AutoencoderKLWan
    wan_vae: WanVAE
    _parallel: SequenceParallel | None = None
    _offloading: str | None = None

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        device: torch.device = self.transformer.device
        return device

    @property
    def vae_is_apart(self) -> bool:
        """Whether the VAE has a device of its own: then pixels are there, and latents are copied."""
        vae, home = self.wan_vae.device, self._execution_device
        return vae.type != home.type or (vae.index or 0) != (home.index or 0)

    def why_plain(self) -> str | None:
        """Why the transformer can only compute plainly; None if it need not."""
        if self._offloading is not None:
            return f"{self._offloading} keeps them on the CPU between uses; leave one of the two out"
        # Diffusers notes it on models that one of its quantisers has changed.
        if getattr(self.transformer, "hf_quantizer", None) is not None:
            return "they are quantised; leave quantization_config out, or compute plainly"
        if self.transformer.hybrid.state.writes is Writes.NOISY:
            return f"{NOISY_WRITES}; compute plainly"
        return None

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep text encoder and transformer on the CPU between uses, one of them at a time on the GPU.

        Args:
            gpu_id, device: of the GPU, as in diffusers.

        Raises:
            InputError: there is no GPU, processes compute videos together, or the VAE has a device of its own.
        """
        self._offload("enable_model_cpu_offload", super().enable_model_cpu_offload, gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep text encoder and transformer on the CPU, and copy every layer to the GPU when it is used: slow.

        Args:
            gpu_id, device: of the GPU, as in diffusers.

        Raises:
            InputError: as for `enable_model_cpu_offload`.
        """
        self._offload("enable_sequential_cpu_offload", super().enable_sequential_cpu_offload, gpu_id, device)

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),
        offload_type: str = "leaf_level",
        exclude_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Keep layers of text encoder and transformer on the CPU, and copy them to the GPU in groups, as in diffusers.

        Args:
            onload_device, offload_device, options: as in diffusers. Nothing but the transformer goes to the disk.
            offload_type: "leaf_level". With "block_level", groups are copied when a block is called as a whole; the
                keys and values of the text are computed once per video, outside of that.
            exclude_modules: parts that stay on `onload_device`, beside the VAE.

        Raises:
            InputError: another type, or as for `enable_model_cpu_offload`.
        """
        named = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        if offload_type != "leaf_level" and "transformer" not in named:
            raise InputError(
                f"offload_type {offload_type!r} does not go with this transformer, whose keys and values of the text "
                "are computed outside of its blocks: give offload_type='leaf_level', or exclude_modules='transformer'"
            )
        if options.get("offload_to_disk_path") is not None and "text_encoder" not in named:
            raise InputError(
                "offload_to_disk_path does not go with this text encoder, whose embedding has two names: diffusers "
                "reads it back wrong; leave it out, or give exclude_modules='text_encoder'"
            )
        require_device(torch.device(onload_device))
        self._require_can_offload(GROUPS)
        super().enable_group_offload(
            torch.device(onload_device),
            offload_device,
            offload_type,
            exclude_modules=[*named, "vae"],
            **options,
        )
        self._offloading = GROUPS

    def _offload(
        self,
        name: str,
        enable: Callable[..., None],
        gpu_id: int | None,
        device: torch.device | str | None,
    ) -> None:
        self._require_can_offload(name)
        if device is None and not torch.accelerator.is_available():
            raise InputError(f"{name} needs a GPU, none is found: leave it out")
        if device is not None:
            require_device(torch.device(device))  # found missing later, it would leave some parts with hooks
        enable(gpu_id, device) if device is None else enable(gpu_id, torch.device(device))
        self._offloading = name

    def _require_can_offload(self, name: str) -> None:
        self.require_one_device(name)
        if self._parallel is not None:
            raise InputError(f"{name} does not go with parallelize: leave one of them out")
        if self._offloading == GROUPS and name != GROUPS:
            raise InputError(f"{name} does not go with {GROUPS}, which cannot be undone: load the pipeline again")
        self.undo_fast_form()

    def undo_fast_form(self) -> None:
        """See `SpeedMixin`."""
        raise NotImplementedError

    def remove_all_hooks(self) -> None:
        """As in diffusers: nothing is offloaded from now on; move the pipeline to a device then."""
        super().remove_all_hooks()
        self._offloading = None

    def bring(self, part: torch.nn.Module) -> None:
        """Have a part where it computes, if it is offloaded as a whole: its methods are called, not the module."""
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(part)

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
        if self._parallel is not None or self._offloading is not None or hasattr(self.vae, "_hf_hook"):
            raise InputError("vae_device goes neither with parallelize nor with CPU offloading: leave it out")
        self.wan_vae.to(device)
        return partial(self.wan_vae.to, home)
