"""Memory probe, leakage probe and memory benchmark."""
