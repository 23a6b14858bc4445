"""Task files (YAML) and the functions that they name."""
