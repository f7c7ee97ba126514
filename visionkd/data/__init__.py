"""Where samples come from: folders, archives, known data sets, scenes drawn on the fly; and how they are batched."""
