"""From one saved adapter to the layouts that servers read right, each with a parity certificate."""
