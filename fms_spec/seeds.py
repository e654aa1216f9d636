"""Seeds: any integer from 0 to LARGEST, and what is drawn from one of them at many places."""

import hashlib

LARGEST = 2**63 - 1  # what torch, numpy and vLLM all take


def mixed(seed: int, *numbers: int) -> int:
    """A seed for the place that `numbers` name, ints from 0 on: an int from 0 to LARGEST, the same on every machine.

    A sum tells the places of a small seed apart. One that is over LARGEST is hashed and not cut: CPU generators look at the last 32 bits
    only, and those of 2**40 would be those of 0.
    """
    total = seed
    for number in numbers:
        total = total * 1_000_003 + number
    if total <= LARGEST:
        return total
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
