"""What generation costs: rows of models, lengths of video, one table. `scripts/benchmark.py` is the way in."""
