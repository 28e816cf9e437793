"""One video over several GPUs: exchanges between ranks, and weights sharded over them."""
