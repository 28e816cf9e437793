"""Which layers to convert: scores, and gates learned under a budget."""
