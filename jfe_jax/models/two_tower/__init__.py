"""Late-fusion baselines: two towers, merged by a sum or by fusion layers."""
