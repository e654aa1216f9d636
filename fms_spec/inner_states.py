"""The residual stream that enters chosen layers of a base model, given beside the states after its final norm.

Shapes: b batch, n tokens, d base width, k chosen layers.

Layers are counted as vLLM's EAGLE-3 does: id i is what enters layer i, so that 0 is the embedding after any multiplier, and the number of
layers is what leaves the last one, before the final norm.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fms_spec.errors import UserError


class InnerStates:
    """Hooks with which a trunk's forward gives [b, n, (1 + k) d]: its own states first, then those of each id. `remove` takes them out.

    Each is copied as it passes, so that no layer's activations are held until the end.

    Args:
        name: of the base model. trunk: called with tokens [b, n] first, its states the first of what it gives. layers: the trunk's.
        count: how many the base model has, of which a plan's trunk has the first few. ids: k of 0 to `count`. width: d. dtype: of states.
    """

    def __init__(self, name: str, trunk: nn.Module, layers: nn.ModuleList, count: int, ids: Sequence[int], width: int, dtype: torch.dtype):
        self.name, self.width, self.dtype, self.parts = name, width, dtype, 1 + len(ids)
        self.hooks = [trunk.register_forward_pre_hook(self.begin), trunk.register_forward_hook(self.end)]
        for part, index in enumerate(ids, start=1):
            if index < count:
                layer = layers[index * len(layers) // count]
                self.hooks.append(layer.register_forward_pre_hook(partial(self.enters, part), with_kwargs=True))
            else:
                self.hooks.append(layers[-1].register_forward_hook(partial(self.leaves, part)))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0]
        self.states = torch.empty(*tokens.shape, self.parts, self.width, dtype=self.dtype, device=tokens.device)

    def enters(self, part: int, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.copy(part, (*args, *named.values())[0])  # ibm-fms names what enters a layer, `transformers` doesn't

    def leaves(self, part: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.copy(part, output[0] if isinstance(output, tuple) else output)

    def end(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        self.copy(0, output[0])
        states = self.states.flatten(-2)
        del self.states  # or the next forward would have two at once
        if isinstance(output, tuple):
            return states, *output[1:]
        output.last_hidden_state = states
        return output

    def copy(self, part: int, states: torch.Tensor) -> None:
        if states.shape != self.states.shape[:2] + self.states.shape[3:]:
            held = f"its layers hand on {list(states.shape)} where its states are {[*self.states.shape[:2], self.width]}"
            raise UserError(f"base model {self.name}: {held}; leave speculator.base_layers out")
        self.states[:, :, part] = states
