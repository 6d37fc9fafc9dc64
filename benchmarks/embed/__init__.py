"""`jfe embed` compared with sentence-transformers."""
