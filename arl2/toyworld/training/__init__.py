"""Training of the toy world's VAE, text encoder and transformer."""
