"""Models as files: packaging, and what comes with it."""
