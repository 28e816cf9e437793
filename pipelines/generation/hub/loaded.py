"""The pipeline of an exported folder, as diffusers builds it."""

import json
from pathlib import Path
from typing import Any

from pipelines.generation.pipeline import CausalVideoPipeline
from wan.checkpoints.configs import read_config
from wan.utils.files import write_text

PIPELINE_FILE = "pipeline.py"
CLASS = "ArlVideoPipeline"
PIPELINE_SOURCE = f'''"""Loads this folder into diffusers; needs the package that the model card names."""

try:
    from pipelines.generation.hub import loaded
except ImportError as error:
    raise ImportError(
        "this model needs the code of ARL2 beside diffusers: clone it and run `pip install -e .`, see the model card"
    ) from error


class {CLASS}(loaded.HubVideoPipeline):
    """See the model card."""
'''
"""The file that diffusers runs with `trust_remote_code`.

It holds no model code. Diffusers copies that one file, with the files beside it that it imports by name, into a cache
of its own; the packages behind this pipeline are some hundred modules in folders, which do not travel that way.
"""


class HubVideoPipeline(CausalVideoPipeline):
    """A `CausalVideoPipeline` whose saved folder plain diffusers loads again."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As `CausalVideoPipeline.save_pretrained`, with the file that diffusers runs.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        super().save_pretrained(save_directory, **options)
        write_pipeline_file(Path(save_directory))


def write_pipeline_file(folder: Path) -> None:
    """Let plain diffusers load the folder of a saved pipeline.

    Args:
        folder: that `save_pretrained` wrote.
    """
    write_text(folder / PIPELINE_FILE, PIPELINE_SOURCE)
    index = folder / "model_index.json"
    settings = read_config(index) | {"_class_name": [Path(PIPELINE_FILE).stem, CLASS]}
    write_text(index, json.dumps(settings, indent=2, sort_keys=True) + "\n")
