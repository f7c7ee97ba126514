"""What a device needs to run an exported model: numpy, Pillow and the engine's own package, never torch."""
