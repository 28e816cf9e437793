"""ARL²: attend locally, remember linearly. Hybrid attention with a fixed-size recurrent memory for causal Wan."""

__version__ = "0.1.0"
