"""Transformers whose weights diffusers' quantisers make smaller while they are loaded."""

from pathlib import Path
from typing import Any

import torch

from arl2.model import HybridWanModel
from wan.checkpoints.configs import read_config
from wan.checkpoints.formats import WEIGHT_FILES
from wan.checkpoints.loading import read_folder
from wan.checkpoints.tensors import require_finite
from wan.utils.errors import InputError

TRANSFORMER = "transformer"


def load_quantised(
    folder: Path, quantization_config: Any, dtype: torch.dtype | None, device: torch.device
) -> HybridWanModel:
    """Load a folder's transformer through diffusers' own loader, which quantises its linear layers.

    Args:
        folder: that `save_pretrained` wrote, of the transformer itself or of a pipeline. Weights of other layouts are
            converted first (scripts/convert_checkpoint.py).
        quantization_config: `BitsAndBytesConfig`, `TorchAoConfig` and so on of diffusers; or its
            `PipelineQuantizationConfig`, of the transformer alone.
        dtype: of what is not quantised, and of computation.
        device: of the transformer.

    Raises:
        InputError: the package of the quantiser is missing, the device cannot, or the weights are in another layout.
    """
    config = _of_transformer(quantization_config)
    inner = folder / TRANSFORMER
    home = inner if (inner / "config.json").is_file() else folder
    if not (home / "config.json").is_file() or read_config(home / "config.json").get("_class_name") != "HybridWanModel":
        raise InputError(
            f"quantization_config needs a transformer that save_pretrained wrote, {folder} holds another layout: make "
            "such a folder with scripts/convert_checkpoint.py"
        )
    require_finite(*read_folder(home, WEIGHT_FILES))  # a quantiser makes numbers of NaN
    try:
        model = HybridWanModel.from_pretrained(
            home, quantization_config=config, dtype=torch.float32 if dtype is None else dtype
        )
    except InputError:
        raise
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"this quantization_config cannot be used here: {_first_line(error)}") from error
    model.eval().requires_grad_(False)
    if next(model.parameters()).device != device:
        model.to(device)
    return model


def _of_transformer(given: Any) -> Any:
    """The part of a config that is the transformer's.

    Raises:
        InputError: it quantises other parts too, or nothing.
    """
    resolve = getattr(given, "_resolve_quant_config", None)
    if resolve is None:
        return given
    named = set(given.components_to_quantize or given.quant_mapping or ())
    if named != {TRANSFORMER}:
        others = ", ".join(sorted(named - {TRANSFORMER})) or "no part"
        raise InputError(
            f"quantization_config names {others}: only the transformer is quantised here; load another part with its "
            "own from_pretrained, and pass it as text_encoder="
        )
    return resolve(is_diffusers=True, module_name=TRANSFORMER)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
