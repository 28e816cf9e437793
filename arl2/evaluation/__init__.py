"""Deviation of a model from its teacher, measured without weights of any other model."""
