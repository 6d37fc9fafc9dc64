"""The benchmarks of the README, each beside what a user would do instead."""
