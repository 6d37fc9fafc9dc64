"""A training step compared with PyTorch."""
