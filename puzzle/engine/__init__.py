"""Executes plans: process groups, pipeline runner, optimizer, generation."""
