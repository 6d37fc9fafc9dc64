"""What the benchmarks share: results, tables, timing, model sizes."""
