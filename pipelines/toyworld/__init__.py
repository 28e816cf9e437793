"""The toy world's study: what runs, and its table."""
