"""Tests across the wire, and the executors that they use instead of a model."""
