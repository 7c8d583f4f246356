"""An OpenAI-compatible server: requests, the batch that answers them, answers."""
