"""States to resume from and models to export, as boxes of logical tensors."""
