"""Executes plans: process groups, pipelines, optimizer, generation."""
