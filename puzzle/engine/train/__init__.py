"""Optimizer steps: gradient buckets, ZeRO-1 AdamW, offload of its states."""
