"""Writes and restores model and training checkpoints through Orbax."""
