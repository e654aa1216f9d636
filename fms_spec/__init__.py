"""The library, and all there is in the wheel: the frozen base model, attached heads and their losses, decoding, acceptance."""
