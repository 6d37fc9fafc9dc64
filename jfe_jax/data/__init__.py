"""Items, tokens, images and batches on the host. NumPy only: nothing here imports jax."""
