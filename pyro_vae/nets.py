r"""Networks: plain maps from a tensor to a tensor.

A network knows nothing of probability. The number of its outputs comes from the family whose parameters
it computes (:mod:`pyro_vae.distributions`), and any leading shape passes through, so that the same network
serves one datum, a batch, and a batch of Monte Carlo samples.

The paper's networks (Kingma & Welling 2013, appendix C) have one hidden layer of tanh units:

.. math:: \eta = W_2 \tanh(W_1 x + b_1) + b_2 .
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def glorot(layer: nn.Linear) -> None:
    r"""Weights uniform with variance 2 / (fan_in + fan_out), biases 0 (Glorot & Bengio 2010)."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def small_normal(layer: nn.Linear) -> None:
    r"""Weights and biases from :math:`N(0, 0.01^2)` (Kingma & Welling 2013, section 5).

    The paper prints N(0, 0.01); its authors' code draws with *standard deviation* 0.01.
    """
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.normal_(layer.bias, std=0.01)


class MLP(nn.Module):
    r"""A multilayer perceptron, :math:`(*, \text{inputs}) \to (*, \text{outputs})`, linear at the end.

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        hidden: Units of each hidden layer; empty for a linear map.
        activation: Makes the non-linearity of the hidden layers.
        init: Initialises one linear layer in place; see :func:`glorot` and :func:`small_normal`.
        output_bias: Initial bias of the last layer instead of the one drawn by ``init``, such as
            ``family.bias(x.mean(0))``, with which every output starts at the mean of the data.

    Raises:
        ValueError: If ``output_bias`` does not have ``outputs`` numbers; in ``forward``, if the last
            axis of the input does not have ``inputs``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (500,),
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        init: Callable[[nn.Linear], None] = glorot,
        output_bias: Float[Tensor, " outputs"] | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((inputs, *hidden, outputs)):
            layers += [nn.Linear(fan_in, fan_out), activation()]
            init(layers[-2])
        self.layers = nn.Sequential(*layers[:-1])
        self.inputs = inputs
        if output_bias is not None:
            if output_bias.shape != (outputs,):
                raise ValueError(
                    f"output_bias has shape {tuple(output_bias.shape)}, this MLP has {outputs} outputs"
                )
            with torch.no_grad():
                self.layers[-1].bias.copy_(output_bias)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Outputs for every vector along the last axis."""
        if inputs.shape[-1] != self.inputs:
            raise ValueError(
                f"this MLP takes vectors of {self.inputs} numbers, but was given shape "
                f"{tuple(inputs.shape)}: flatten the data, or build the network for this size"
            )
        return self.layers(inputs)
