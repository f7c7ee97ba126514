"""Parts of the zoo's tools."""
