"""The ways in which checkpoints store a weight, one small class for each; nobody else knows their key names."""
