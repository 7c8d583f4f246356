"""moesparse: prune Mixture-of-Experts language models and run the sparse result."""

from moesparse._version import __version__

__all__ = ["__version__"]
