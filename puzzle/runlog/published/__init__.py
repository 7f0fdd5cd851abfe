"""Reads the published logs, line by line."""
