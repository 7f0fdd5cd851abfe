"""Launchers place processes; each process runs the same program."""
