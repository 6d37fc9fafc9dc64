"""Compiles a config ahead of time for a TPU slice and reports memory, FLOPs and traffic."""
