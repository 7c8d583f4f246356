"""Text through the dense model once: sums per expert, and what that takes."""
