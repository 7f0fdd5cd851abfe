"""The decoder as torch modules, its tensor-parallel parts, and Hugging Face files in and out."""
