"""The Wan 2.1 VAE as a stream: decoding and encoding, fast and tiny forms."""
