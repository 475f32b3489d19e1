"""Doing again what a plan log says: the scheduler on its inputs, an executor on its plans."""
