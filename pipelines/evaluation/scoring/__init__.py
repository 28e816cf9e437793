"""Scores of videos: metrics, one JSON per run with intervals, and the comparison of two runs."""
