"""The world itself: scenes, captions, pictures, a reader of pictures, latents."""
