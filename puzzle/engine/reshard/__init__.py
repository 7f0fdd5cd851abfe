"""Executes switch plans: buckets of rows over messages or peer copies."""
