"""Embeds items with a trained model and stores the vectors in shards on disk."""
