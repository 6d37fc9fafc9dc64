"""The contrastive loss compared with PyTorch and plain jit."""
