"""Random numbers that depend on a key alone: the same seed and step always draw the same."""

import torch

_MASK64 = (1 << 64) - 1


def generator_for(*key: int) -> torch.Generator:
    """A generator of its own for every key, for example ``(seed, stream, step)``."""
    state = 0
    for part in key:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    # The generator uses 32 bits of its seed.
    return torch.Generator().manual_seed((state ^ (state >> 32)) & 0xFFFFFFFF)
