"""Validates a data set and converts it to ArrayRecord shards for training."""
