"""From a prompt to a video file: the pipeline, its settings, and what goes in and out."""
