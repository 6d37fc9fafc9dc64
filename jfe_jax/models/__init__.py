"""Models: packed items to unit vectors. A backbone is one folder."""
