"""Arithmetic whose numbers depend neither on the layout nor on what is computed beside them."""
