"""The memory probe and the benchmark made of it."""
