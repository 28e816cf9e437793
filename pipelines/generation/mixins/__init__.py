"""Topics of `pipelines.generation.pipeline.CausalVideoPipeline`, one class each, as diffusers divides its pipelines."""
