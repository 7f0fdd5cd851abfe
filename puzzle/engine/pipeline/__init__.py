"""Passes of one model or several through the stages of a pipeline."""
