"""Importing models into the local store, and finding them there."""
