"""Model files for devices, each checked against PyTorch before it is announced."""
