"""Contrastive losses over the global batch, computed in tiles."""
