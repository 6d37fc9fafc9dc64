"""Benchmarks that are built locally from openly licensed packages."""
