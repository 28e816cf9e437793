"""Tables of results: the paper's, filled from the JSON files of benchmarks, scores and layer selection."""
