"""From prompts to videos: the pipeline, its command line, and the loop over prompts."""
