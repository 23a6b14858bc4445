"""Seeded draws that all processes and resumed runs share."""

import hashlib


def seeded_index(seed: int, step: int, micro_batch: int, choices: int) -> int:
    """Draw a number in ``0 .. choices - 1`` from the arguments alone: equal on every process and after a resume."""
    text = f"{seed}/{step}/{micro_batch}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) % choices
