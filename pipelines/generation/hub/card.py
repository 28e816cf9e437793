"""The model card of an exported folder."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipelines.config import MemoryConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.errors import InputError
from wan.utils.files import read_json

GB = 1e9


@dataclass(frozen=True)
class CardFacts:
    """What only who exports a model knows.

    Attributes:
        name: of the model.
        licence: its identifier on the hub, such as "apache-2.0".
        base_model: repository of the model that this one was made from.
        recipe: how it was made, Markdown; empty if it is not told.
        memory: to be given with every call, where it is not what a call takes by default; None otherwise.
        caveat: what the model needs that this code lacks, if anything.
    """

    name: str
    licence: str
    base_model: str
    recipe: str = ""
    memory: MemoryConfig | None = None
    caveat: str | None = None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that inference.py left beside its videos.

    Raises:
        InputError: there is none, or one is no record.
    """
    found = [read_json(path, InputError, "make the videos again") for path in sorted(folder.glob("*.json"))]
    if not found:
        raise InputError(f"no records in {folder}: give an --output_folder or --metrics_folder of inference.py")
    for record, path in zip(found, sorted(folder.glob("*.json")), strict=True):
        if not isinstance(record.get("fps"), dict) or not isinstance(record.get("settings"), dict):
            raise InputError(f"{path} is no record of a video: give a folder with nothing but those of inference.py")
    return found


def model_card(pipeline: CausalVideoPipeline, facts: CardFacts, records: Sequence[Mapping[str, Any]]) -> str:
    """The card as Markdown with its front matter.

    Args:
        records: of videos that the model made, for its numbers; none leaves the table out.
    """
    sections = [_front_matter(facts), f"# {facts.name}", _about(pipeline, facts), _usage(facts), _sampling(pipeline)]
    if facts.caveat:
        sections.append(f"## What is missing\n\n{facts.caveat}")
    if facts.recipe:
        sections.append(f"## How it was made\n\n{facts.recipe.strip()}")
    sections += [_memory(pipeline), *([_numbers(records)] if records else [])]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    return f"""---
license: {facts.licence}
base_model: {facts.base_model}
library_name: diffusers
pipeline_tag: text-to-video
tags: [text-to-video, autoregressive, causal, linear-attention]
---"""


def _about(pipeline: CausalVideoPipeline, facts: CardFacts) -> str:
    hybrid, layers = pipeline.transformer.hybrid, pipeline.transformer.config.num_layers
    kind = f"{len(hybrid.layers)} of {layers} layers are hybrid ({hybrid})" if hybrid.layers else f"{hybrid}"
    return (
        f"A causal video diffusion transformer made from [{facts.base_model}](https://huggingface.co/{facts.base_model})"
        f". It generates a video in blocks of {pipeline.config.frames_per_block} latent frames, handed out as "
        f"soon as they exist. {kind[0].upper()}{kind[1:]}. Method: ARL² ([arXiv 2605.16579]"
        "(https://arxiv.org/abs/2605.16579)), on Causal Forcing ([arXiv 2602.02214](https://arxiv.org/abs/2602.02214))."
    )


def _usage(facts: CardFacts) -> str:
    imports, argument, why = "", "", ""
    if facts.memory is not None:
        fields = (f"{name}={value!r}" for name, value in _plain(facts.memory).items())
        imports = "from pipelines.config import MemoryConfig\n"
        argument = f", memory=MemoryConfig({', '.join(fields)})"
        why = "\n\nThe folder does not store the `memory`: give it with every call."
    return f"""## Use

The folder holds weights and settings. The code is the `arl2` package: clone its repository, then `pip install -e .`
there. Diffusers alone cannot run the model, since none of its pipelines keeps a memory between blocks.

```python
import torch
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained("THIS_REPOSITORY", trust_remote_code=True, dtype=torch.bfloat16)
pipe.to("cuda")
frames = pipe("a cat on a windowsill", output_type="pil"{argument}).frames[0]
```{why}

`CausalVideoPipeline.from_pretrained("THIS_REPOSITORY")` of the package loads the same, and runs no code of this
repository."""


def _plain(memory: MemoryConfig) -> dict[str, Any]:
    """The fields of a memory as plain values, those alone that are not the default's."""
    fields, default = asdict(memory), asdict(MemoryConfig())
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in fields.items()
        if value != default[name]
    }


def _sampling(pipeline: CausalVideoPipeline) -> str:
    config = pipeline.config
    guidance = "built in (distilled); `guidance_scale` is refused" if config.guidance_distilled else "`guidance_scale`"
    trained = pipeline.transformer.trained_memory
    rows = {
        "steps": ", ".join(map(str, config.denoising_steps)),
        "steps of the first block": config.first_block_denoising_steps and str(config.first_block_denoising_steps),
        "timestep shift": config.timestep_shift,
        "frames per block": f"{config.frames_per_block} (latent)",
        "guidance": guidance,
        "video": f"{config.num_frames} frames of {config.height}×{config.width} pixels" if config.num_frames else None,
        "memory of the softmax layers in training": trained and str(trained),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["## Settings", "", "| | |", "|---|---|", *lines])


def _memory(pipeline: CausalVideoPipeline) -> str:
    parts = {name: part for name, part in pipeline.components.items() if hasattr(part, "parameters")}
    rows = [
        f"| {name} | {sum(each.numel() for each in part.parameters()) / 1e6:.1f} | "
        f"{sum(each.nbytes for each in part.parameters()) / GB:.2f} |"
        for name, part in parts.items()
    ]
    text = [
        "## Memory",
        "",
        "| part | million parameters | GB of weights, as stored |",
        "|---|---|---|",
        *rows,
    ]
    config = pipeline.config
    if config.num_frames:
        size = pipeline.latent_size(config.height, config.width)
        model, frames = pipeline.transformer, pipeline.latent_frames(config.num_frames)
        one, whole = (model.memory_bytes(count, *size, model.dtype) for count in (config.frames_per_block, frames))
        text += [
            "",
            f"Keys, values and states of one video take {one / GB:.3f} GB after the first block and {whole / GB:.3f} "
            f"GB after {config.num_frames} frames with full memory; with a window they stop growing.",
        ]
    return "\n".join(text)


def _numbers(records: Sequence[Mapping[str, Any]]) -> str:
    def median(values: Sequence[Any], digits: int = 2) -> str:
        known = [value for value in values if isinstance(value, int | float)]
        return f"{statistics.median(known):.{digits}f}" if known else "–"

    devices = sorted({str(record.get("device")) for record in records})
    torch_versions = sorted({str(record.get("versions", {}).get("torch")) for record in records})
    peaks = [record["peak_memory_bytes"] / GB for record in records if record.get("peak_memory_bytes")]
    rows = {
        "videos": str(len(records)),
        "frames of video per second, prompt to file": median([record["fps"].get("end_to_end") for record in records]),
        "the same of the transformer alone": median([record["fps"].get("dit") for record in records]),
        "seconds to the first frame": median([record.get("time_to_first_frame") for record in records]),
        "most memory allocated, GB": median(peaks),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value != "–"]
    about = f"Medians over records of `inference.py`: {', '.join(devices)}; torch {', '.join(torch_versions)}."
    return "\n".join(["## Numbers", "", about, "", "| | |", "|---|---|", *lines])
