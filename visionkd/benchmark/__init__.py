"""How fast and how large a model is, measured the same way for each."""
