"""Weight files: every public layout in, strictly."""
