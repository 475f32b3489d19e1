"""Tracing with OpenTelemetry: where spans go, and what they are called."""
