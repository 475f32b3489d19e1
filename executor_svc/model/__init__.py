"""Decoder models: configuration, weights, and the forward pass over flattened tokens."""
