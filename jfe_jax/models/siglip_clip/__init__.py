"""SigLIP and CLIP dual encoders."""
