"""A transformers model as blocks and layers, in memory or on the disk."""
