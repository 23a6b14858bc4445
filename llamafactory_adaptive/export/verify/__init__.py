"""Proof that a server reads an export as PEFT reads the adapter it came from."""
