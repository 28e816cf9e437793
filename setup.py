"""Packaging. `pip install -e .`; extras: gpu, flash-attn, train, eval, demo, dev."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "arl2" / "__init__.py").read_text())
assert VERSION is not None

setup(
    name="arl2",
    version=VERSION[1],
    description="Autoregressive video diffusion whose cross-frame attention is a fixed-size recurrent memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["wan", "wan.*", "arl2", "arl2.*", "pipelines", "pipelines.*"]),
    package_data={"pipelines.evaluation.tables": ["*.yaml"]},
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
