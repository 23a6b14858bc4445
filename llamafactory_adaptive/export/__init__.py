"""Export of a saved adapter to the layouts that servers read correctly, each with a parity certificate."""
