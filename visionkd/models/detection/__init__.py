"""Networks that find objects: torchvision's own, and three kinds of detector on any backbone of timm."""
