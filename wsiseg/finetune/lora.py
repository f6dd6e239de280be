"""Low-rank adapters: a linear layer's weight W becomes W + s B A, of which only A and B are trained [1]_.

Written as a parametrisation of the weight, so that whoever uses ``layer.weight`` sees the adapted one and no layer changes its name. PEFT does
more (many adapters, their own files, quantised layers) and needs accelerate and transformers for it; here adapters end as plain weights.

References
----------
.. [1] Hu et al.: LoRA, ICLR 2022, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Iterable


class LowRank(nn.Module):
    """The update of one weight.

    Parameters
    ----------
    outputs, inputs
        Shape of the weight.
    rank
        At most the smaller of the two.
    scale
        s: alpha / rank; 1 with alpha = rank, as SAMPO has it.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        rank = min(rank, outputs, inputs)
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))  # so that nothing changes at first
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.scale * (self.b @ self.a)


def add_adapters(modules: Iterable[nn.Module], rank: int) -> int:
    """Add adapters to every linear layer, in place, and freeze its own weight.

    Parameters
    ----------
    modules
        Networks, or parts of them.
    rank
        Of the adapters.

    Returns
    -------
    int
        How many layers have one now.

    Examples
    --------
    >>> from torch import nn
    >>> layer = nn.Linear(8, 4)
    >>> add_adapters([layer], rank=2)
    1
    >>> sorted(name for name, p in layer.named_parameters() if p.requires_grad and "weight" in name)
    ['parametrizations.weight.0.a', 'parametrizations.weight.0.b']
    """
    count = 0
    for module in modules:
        for layer in list(module.modules()):
            if not isinstance(layer, nn.Linear) or parametrize.is_parametrized(layer):
                continue
            outputs, inputs = layer.weight.shape
            layer.weight.requires_grad_(False)
            adapter = LowRank(outputs, inputs, rank).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", adapter)
            count += 1
    return count


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """State dict with the adapters in the weights, under the names that the network has without them.

    Parameters
    ----------
    network
        With or without adapters; it stays as it is.

    Returns
    -------
    dict of str to Tensor
        Detached, on the CPU.
    """
    mark = "parametrizations.weight."
    state = {name: value for name, value in network.state_dict().items() if mark not in name}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer):
            state[f"{name}.weight" if name else "weight"] = layer.weight
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
