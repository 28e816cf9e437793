"""The study of distillation: rows, ablations, objectives."""
