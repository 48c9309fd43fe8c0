r"""What training does for mixtures of experts besides the loss: keep them all busy.

Equation: `moe-total-loss` $\mathcal L=\mathcal L_{\rm task}+\lambda_{\rm aux}\mathcal L_{\rm aux}$
Equation: `moe-bias-balancing` $b_e\leftarrow b_e+u\,\mathrm{sign}(\bar N-N_e)$ after every step
Source: notes §8.8; deepseek.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from minillm.autograd import Tensor
from minillm.nn.experts import MixtureOfExperts, Routing
from minillm.nn.module import Module


def expert_layers(model: Module) -> list[MixtureOfExperts]:
    """The layers of experts of a model, in the order in which a pass visits them."""
    return [module for module in model.submodules() if isinstance(module, MixtureOfExperts)]


def mean_aux_loss(record: Sequence[Routing]) -> Tensor:
    """The load-balancing loss, the mean over the layers that a pass has visited."""
    total = record[0].aux_loss
    for routing in record[1:]:
        total = total + routing.aux_loss
    return total * (1.0 / len(record))


def update_biases(layers: Sequence[MixtureOfExperts], loads: Iterable[Sequence[np.ndarray]], rate: float) -> None:
    """Move the bias of every sigmoid router; ``loads`` has the counts of each pass, layer by layer."""
    for layer, of_layer in zip(layers, zip(*loads, strict=True), strict=True):
        if layer.bias is not None:
            layer.update_bias(np.sum(of_layer, axis=0), rate)
