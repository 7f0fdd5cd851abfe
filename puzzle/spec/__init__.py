"""What a model is, without torch: its tensors, its Hugging Face config, its arithmetic."""
