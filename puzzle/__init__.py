"""PUZZLE: RLHF with light-weight context switches."""

__version__ = "0.1.0"
