"""Measuring a running server through the streaming client: `blockyard bench`."""
