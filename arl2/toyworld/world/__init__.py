"""Toy world: scenes, captions, rendering, a reader of pixels, latents."""
