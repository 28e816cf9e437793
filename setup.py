"""Packaging. `pip install -e .`; extras: gpu, flash-attn, train, eval, demo, dev."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "arl2" / "__init__.py").read_text())
assert VERSION is not None
SHIPPED = (
    *("inference.py", "train_stage1.py", "train_stage2.py", "scripts/**/*.py"),
    *("configs/**/*.yaml", "prompts/*.jsonl", "prompts/*.txt", "models/toyworld/**/*.json"),
    *("models/toyworld/**/*.safetensors", "docs/results/distillation/study/stage1.safetensors"),
)
"""What a wheel holds beside the packages, in the folder that `pipelines/console/shipped.py` reads."""


class BuildWithShipped(build_py):
    """Puts what ships beside the code into the wheel; an editable install has it in the checkout."""

    def run(self) -> None:
        """Copy the packages, and then what ships."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pipelines" / "console" / "checkout"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build, which may hold what was deleted since
        for path in shipped():
            copy = target / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy)

    def get_source_files(self) -> list[str]:
        """Source distributions hold what ships, too."""
        return [*super().get_source_files(), *map(str, shipped())]


def shipped() -> list[Path]:
    """Paths below the root."""
    return sorted({path.relative_to(ROOT) for pattern in SHIPPED for path in ROOT.glob(pattern)})


setup(
    name="arl2",
    version=VERSION[1],
    description="Autoregressive video diffusion whose cross-frame attention is a fixed-size recurrent memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["wan", "wan.*", "arl2", "arl2.*", "pipelines", "pipelines.*"]),
    package_data={"pipelines.evaluation.tables": ["*.yaml"]},
    cmdclass={"build_py": BuildWithShipped},
    entry_points={"console_scripts": ["arl2 = pipelines.console.run:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "diffusers>=0.42,<0.43",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "einops>=0.8",
        "psutil>=6",
        "numpy>=2",
        "pillow>=11",
        "huggingface_hub>=1.32,<3",
        "av>=18",
        "sentencepiece>=0.2",
        "matplotlib>=3.10,<4",
        "ftfy>=6.3",
        "tqdm>=4.70",
        "rich>=15",
        "pyyaml>=6",
        "shtab>=1.13,<2",
    ],
    extras_require={
        # Kernels for the recurrent memory. They need a GPU, and come without a build.
        "gpu": ["flash-linear-attention>=0.6,<0.7"],
        # Not needed: PyTorch's own attention is as fast on Hopper. Builds from source.
        "flash-attn": ["flash-attn>=2.8"],
        "train": ["tensorboard>=2.21"],
        # Never in the core: torchvision does not import beside a CPU build of torch, and breaks diffusers there.
        "eval": ["torchvision>=0.26", "open_clip_torch==3.3.0", "timm>=1.0.31", "pyiqa>=0.1.16", "torchmetrics>=1.9"],
        "demo": ["gradio>=6.31"],
        "dev": ["pytest>=9", "pytest-xdist>=3.8", "ruff==0.17.6", "mypy>=2.4", "types-PyYAML", "playwright>=1.60"],
    },
)
