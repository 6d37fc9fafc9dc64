"""Exact top-k search over embeddings, on any mesh."""
