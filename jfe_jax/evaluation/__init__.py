"""Evaluates retrievers: queries, candidate pools, protocols, metrics and results."""
