"""The `jfe` command line: one thin module per verb."""
