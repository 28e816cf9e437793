"""Videos that are generated block by block on request: held, steered, divided, saved and continued."""
