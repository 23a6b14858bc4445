"""Verification that a server reads an export as PEFT reads the original adapter."""
