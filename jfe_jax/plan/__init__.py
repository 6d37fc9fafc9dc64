"""What a config needs on a TPU slice, from its compiled program, without the slice."""
