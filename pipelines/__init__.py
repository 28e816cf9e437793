"""From a prompt to a video file: the pipeline, its settings, and what goes in and out."""

from arl2 import __version__ as __version__  # first of all, since it tells other packages of our names
