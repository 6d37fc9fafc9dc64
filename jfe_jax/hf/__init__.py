"""Hugging Face directories in and out; the only place that knows Hugging Face's names."""
