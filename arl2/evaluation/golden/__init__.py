"""Replays of golden vectors: comparison of our results with those of the reference."""
