"""Tests of the front end against an engine that the tests script."""
