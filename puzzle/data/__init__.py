"""Prompts and tokenizers; no torch."""
