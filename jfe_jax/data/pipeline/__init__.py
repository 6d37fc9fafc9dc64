"""The training input pipeline: mixing, reading, encoding and packing pairs into batches."""
