"""Networks: names, weights, and one wrapper around timm and torchvision."""
