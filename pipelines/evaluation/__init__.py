"""Evaluation: suites of prompts, and the videos that are sampled from them."""
