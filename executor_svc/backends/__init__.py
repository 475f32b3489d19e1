"""Devices behind one small protocol: `base` says what a backend does, `cpu` does it here."""
