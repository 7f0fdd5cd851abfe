"""Triton kernels that stand in for plain functions on CUDA; imported only there."""
