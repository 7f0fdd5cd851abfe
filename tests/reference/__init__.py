"""An independent single-process truth: transformers and numpy, no code of puzzle."""
