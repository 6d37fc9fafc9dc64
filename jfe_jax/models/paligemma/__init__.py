"""PaliGemma 1 and 2 as a joint fusion encoder."""
