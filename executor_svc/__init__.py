"""The executor service: a pool of KV blocks and a model, driven by step plans."""
