"""Search for a student: scores that need no training, spaces, and the search itself."""
