"""The page about a model, its runs and its figures."""
