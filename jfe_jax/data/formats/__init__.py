"""Readers of retrieval data sets as they are published: M-BEIR, MMEB, image-caption pairs."""
