"""What the user asked for, and whether it is possible."""
