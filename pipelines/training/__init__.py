"""Training runs: typed configs, the run folder, resuming, export."""
