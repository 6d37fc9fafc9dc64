"""Shared code of the benchmarks: results, tables, timing, model sizes."""
