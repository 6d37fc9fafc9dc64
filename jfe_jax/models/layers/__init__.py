"""Layers that backbones share: projections, scanned blocks, attention."""
