"""Tar archives, image files, ArrayRecord shards and prepared data sets on disk."""
