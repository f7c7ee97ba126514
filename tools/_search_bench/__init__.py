"""The benchmark of the search: students that were distilled, and what scores say of them."""
