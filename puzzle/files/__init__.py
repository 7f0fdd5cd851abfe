"""Files of others and our own: read by type and within limits, written whole or not at all."""
