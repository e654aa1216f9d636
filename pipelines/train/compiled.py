"""torch.compile of what a training step runs outside its losses; which pays on some devices only, so that a config asks for it.

The losses have nothing to gain: their passes over a chunk of logits are few and in place (`fms_spec/losses.py`).
"""

import torch

from fms_spec.errors import UserError


def check_compiler():
    """Compile a line.

    Raises:
        UserError: torch.compile doesn't work here, and why.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # whatever torch's compiler or its absence raises
        raise UserError(f"compile: true: torch.compile doesn't work here ({str(error).splitlines()[0]}); leave it out") from error


def compile_heads(speculator):
    """Compile the step from one head to the next, for any number of positions: how many a later head has is another at every step."""
    speculator.advance = torch.compile(speculator.advance, dynamic=True)


def compile_base_model(base_model):
    """Compile the feed-forward part of each layer, for any number of tokens; attention hangs on where documents end."""
    for name, module in base_model.trunk.named_modules():
        if name.endswith((".ff_sub_layer", ".mlp")):  # ibm-fms's name for it, and that of transformers
            module.compile(dynamic=True)
