"""The sizes of tiny models, by Hugging Face names: 8 query heads, 2 key/value heads, 4 layers and an odd
vocabulary, for parallel layouts."""

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
