"""Blockyard: what users touch (client, command line, local launcher)."""
