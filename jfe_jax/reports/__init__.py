"""HTML and Markdown reports of evaluations and comparisons."""
