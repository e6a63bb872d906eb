"""Self-supervised methods, one page each."""
