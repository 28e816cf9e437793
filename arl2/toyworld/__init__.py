"""A procedural world of coloured shapes and a wall that hides them: data to train on, and a way to measure memory."""
