"""Mines hard negatives for the next training stage."""
