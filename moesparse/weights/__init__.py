"""Which weights of a matrix stay and what they become: formulas, without a model."""
