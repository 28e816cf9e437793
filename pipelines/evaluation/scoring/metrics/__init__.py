"""The metrics, by what they need: pixels alone, a reference, embeddings of frames, other networks."""
