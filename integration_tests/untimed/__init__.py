"""Scheduler, engine and executor in one process: nothing here depends on time or on other load."""
