"""n:m experts at work: the module, transformers, vLLM, a server."""
