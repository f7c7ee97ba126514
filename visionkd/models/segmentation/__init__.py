"""Networks that name the class of every pixel: torchvision's own, and five heads on any backbone of timm."""
