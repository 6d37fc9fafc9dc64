"""Reads and writes Hugging Face, PEFT and sentence-transformers directories."""
