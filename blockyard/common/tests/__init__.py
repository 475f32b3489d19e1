"""Unit tests of blockyard.common."""
