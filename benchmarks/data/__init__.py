"""The data path: validation, preparation, packing, input rate."""
