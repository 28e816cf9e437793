"""Distillation study: rows, ablations, objectives."""
