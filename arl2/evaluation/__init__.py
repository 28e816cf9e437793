"""How far a model is from its teacher, measured without any other model's weights."""
