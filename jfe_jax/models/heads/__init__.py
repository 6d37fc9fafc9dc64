"""Heads: hidden states to embeddings."""
