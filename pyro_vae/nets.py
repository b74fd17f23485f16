r"""Networks: plain maps from a tensor to a tensor.

A network knows nothing of probability. The number of its outputs comes from the family whose parameters
it computes (:mod:`pyro_vae.distributions`), and any leading shape passes through, so that the same network
serves one datum, a batch, and a batch of Monte Carlo samples.

The paper's networks (Kingma & Welling 2013, appendix C) have one hidden layer of tanh units:

.. math:: \eta = W_2 \tanh(W_1 x + b_1) + b_2 .
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_vae.arguments import Count, NonNegative, check, checked
from pyro_vae.errors import NetworkError


@torch.no_grad()
def glorot(layer: nn.Linear) -> None:
    r"""Draw weights uniformly with variance 2 / (fan_in + fan_out), biases 0 (Glorot & Bengio 2010)."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def small_normal(layer: nn.Linear) -> None:
    r"""Draw weights and biases from :math:`N(0, 0.01^2)` (Kingma & Welling 2013, section 5).

    The paper prints N(0, 0.01); its authors' code draws with *standard deviation* 0.01.
    """
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.normal_(layer.bias, std=0.01)


def _check_inputs(net: nn.Module, inputs: Tensor, size: int, of: str = "") -> None:
    """Raise ``NetworkError`` unless these are vectors of ``size`` numbers of the type of the weights."""
    check("inputs", inputs, Tensor)
    name = f"this {type(net).__name__} takes vectors of {size} numbers{of}"
    if inputs.dim() == 0 or inputs.shape[-1] != size:
        raise NetworkError(
            f"{name}, but was given shape {tuple(inputs.shape)}: flatten the data, give the programs all of "
            "their arguments (such as a context) and no others, or build the network for this size"
        )
    dtype = next(net.parameters()).dtype
    if inputs.dtype != dtype:
        raise NetworkError(f"{name}, {dtype} as its weights, but was given {inputs.dtype}: use x.to({dtype})")


class MLP(nn.Module):
    r"""A multilayer perceptron, :math:`(*, \text{inputs}) \to (*, \text{outputs})`, linear at the end.

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        hidden: Units of each hidden layer; empty for a linear map.
        activation: Makes the non-linearity of the hidden layers. With ``nn.GLU`` every layer is gated,
            :math:`(W h + b) \odot \sigma(V h + c)`, as in Tomczak & Welling, *VAE with a VampPrior*, 2018.
        init: Initialises one linear layer in place; see :func:`glorot` and :func:`small_normal`.
        output_bias: Initial bias of the last layer instead of the one drawn by ``init``, such as
            ``family.bias(x.mean(0))``, with which every output starts at the mean of the data.

    Raises:
        ValueError: If ``output_bias`` does not have ``outputs`` numbers.
        NetworkError: In ``forward``, if the last axis of the input does not have ``inputs``.
    """

    @checked
    def __init__(
        self,
        inputs: Count,
        outputs: Count,
        hidden: Sequence[Count] = (500,),
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        init: Callable[[nn.Linear], None] = glorot,
        output_bias: Float[Tensor, " outputs"] | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((inputs, *hidden)):
            layers += [nn.Linear(fan_in, 2 * fan_out if activation is nn.GLU else fan_out), activation()]
            init(layers[-2])
        layers.append(nn.Linear((inputs, *hidden)[-1], outputs))
        init(layers[-1])
        self.layers = nn.Sequential(*layers)
        self.inputs = inputs
        if output_bias is not None:
            self.layers[-1].bias = _output_bias(outputs, output_bias.to(self.layers[-1].bias))

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Outputs for every vector along the last axis."""
        _check_inputs(self, inputs, self.inputs)
        return self.layers(inputs)


class _Residual(nn.Module):
    r""":math:`h + C(\mathrm{ELU}(C(\mathrm{ELU}(h))))`, C convolutions (He et al. 2016, pre-activation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return height, width and colours."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            f"a convolutional network is for images of shape (height, width) or (height, width, colours), "
            f"not {tuple(shape)}: take an MLP"
        )
    height, width, *colours = shape
    if colours and colours[0] > 4 >= height:
        raise ValueError(
            f"an image of shape {tuple(shape)} would be {height} pixels high with {colours[0]} colours: "
            "move the colours to the last axis, as in images.transpose(0, 2, 3, 1)"
        )
    return height, width, colours[0] if colours else 1


def _sizes(height: int, width: int, scales: int) -> list[tuple[int, int]]:
    """Return heights and widths, each half of that before, rounded up; raise ``ValueError`` without any."""
    if scales < 1:
        raise ValueError("channels are those of the convolutions, at least one; an MLP has none")
    sizes = [(height, width)]
    for _ in range(scales):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _halvings(colours: int, channels: Sequence[int], blocks: int) -> nn.Sequential:
    """Convolutions that halve height and width."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((colours, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [_Residual(after) for _ in range(blocks)]
        layers.append(nn.ELU())
    return nn.Sequential(*layers)


def _doublings(
    sizes: Sequence[tuple[int, int]], channels: Sequence[int], outputs: int, blocks: int
) -> nn.Sequential:
    """Convolutions that go back through these sizes, of which the first is the largest."""
    layers: list[nn.Module] = []
    steps = itertools.pairwise((*reversed(channels), outputs))
    for (before, after), size in zip(steps, reversed(sizes[:-1]), strict=True):
        layers += [_Residual(before) for _ in range(blocks)]
        layers += [nn.ELU(), nn.Upsample(size), nn.Conv2d(before, after, 3, padding=1)]
    return nn.Sequential(*layers)


def _output_bias(size: int, start: Tensor | None) -> nn.Parameter:
    """Make a parameter of a bias for every output, from given numbers or 0."""
    if start is not None and start.shape != (size,):
        raise ValueError(f"output_bias has shape {tuple(start.shape)}, this network has {size} outputs")
    return nn.Parameter(torch.zeros(size) if start is None else start.detach().clone())


def _by_kind(images: Tensor, params_per_dim: int) -> Tensor:
    """Flatten images: one kind of parameter after another, pixels row by row, colours last."""
    return images.unflatten(1, (params_per_dim, -1)).movedim(2, 4).flatten(1)


class ConvEncoder(nn.Module):
    r"""Network from flattened images to a vector: halving convolutions, then a linear map.

    Args:
        shape: Shape of an image: (height, width), or (height, width, colours); any size.
        outputs: Size of the vector.
        channels: Channels of the convolutions, one for each halving.
        blocks: Residual blocks after each halving.
        context_dim: Further numbers behind the image (labels, covariates), for the linear map.

    Raises:
        ValueError: If ``shape`` is not that of images.
        NetworkError: In ``forward``, if the input has another size.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[Count],
        outputs: Count,
        channels: Sequence[Count] = (32, 64),
        *,
        blocks: NonNegative = 0,
        context_dim: NonNegative = 0,
    ) -> None:
        super().__init__()
        height, width, colours = _image_shape(shape)
        self.shape, self.context_dim = (height, width, colours), context_dim
        self.layers = _halvings(colours, channels, blocks)
        height, width = _sizes(height, width, len(channels))[-1]
        self.head = nn.Linear((colours, *channels)[-1] * height * width + context_dim, outputs)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Outputs for every image along the last axis."""
        size = math.prod(self.shape)
        of = f" of an image of shape {self.shape} and {self.context_dim} of a context"
        _check_inputs(self, inputs, size + self.context_dim, of)
        rows = inputs.reshape(-1, inputs.shape[-1])
        images, context = rows.split([size, self.context_dim], 1)
        hidden = self.layers(images.unflatten(1, self.shape).movedim(3, 1)).flatten(1)
        return self.head(torch.cat([hidden, context], 1)).reshape(*inputs.shape[:-1], -1)


class ConvDecoder(nn.Module):
    r"""Network from a vector to parameters of every pixel: a linear map, then doubling convolutions.

    Args:
        inputs: Size of the vector.
        shape: Shape of an image: (height, width), or (height, width, colours); any size.
        params_per_dim: Numbers that the family takes for every pixel and colour.
        channels: Channels of the convolutions, in the order of the encoder.
        blocks: Residual blocks before each doubling.
        output_bias: Initial bias, as in :class:`MLP`.

    Raises:
        ValueError: If ``shape`` is not that of images, or ``output_bias`` has another size.
    """

    @checked
    def __init__(
        self,
        inputs: Count,
        shape: Sequence[Count],
        params_per_dim: Count = 1,
        channels: Sequence[Count] = (32, 64),
        *,
        blocks: NonNegative = 0,
        output_bias: Float[Tensor, " outputs"] | None = None,
    ) -> None:
        super().__init__()
        height, width, colours = _image_shape(shape)
        self.shape, self.params_per_dim = (height, width, colours), params_per_dim
        sizes = _sizes(height, width, len(channels))
        self.smallest = (channels[-1], *sizes[-1])
        self.head = nn.Linear(inputs, math.prod(self.smallest))
        self.layers = _doublings(sizes, channels, params_per_dim * colours, blocks)
        self.bias = _output_bias(params_per_dim * math.prod(self.shape), output_bias)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Parameters, one kind after another, of the pixels row by row."""
        _check_inputs(self, inputs, self.head.in_features)
        hidden = self.head(inputs.reshape(-1, inputs.shape[-1])).unflatten(1, self.smallest)
        outputs = _by_kind(self.layers(hidden), self.params_per_dim) + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


class GridEncoder(nn.Module):
    r"""Network from flattened images to a vector at every place of a small grid: convolutions alone.

    Where :class:`ConvEncoder` ends in one vector, this ends in ``places`` of them, row by row: the codes of a
    VQ-VAE (van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*, 2017).

    Args:
        shape: Shape of an image, as for :class:`ConvEncoder`.
        code_dim: Numbers at every place.
        channels: Channels of the convolutions, one for each halving.
        blocks: Residual blocks after each halving.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[Count],
        code_dim: Count,
        channels: Sequence[Count] = (32, 64),
        *,
        blocks: NonNegative = 0,
    ) -> None:
        super().__init__()
        height, width, colours = _image_shape(shape)
        self.shape = (height, width, colours)
        self.layers = _halvings(colours, channels, blocks)
        self.head = nn.Conv2d((colours, *channels)[-1], code_dim, 1)
        self.places = math.prod(_sizes(height, width, len(channels))[-1])

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``places`` vectors, side by side, for every image along the last axis."""
        _check_inputs(self, inputs, math.prod(self.shape), f" of an image of shape {self.shape}")
        images = inputs.reshape(-1, *self.shape).movedim(3, 1)
        return self.head(self.layers(images)).flatten(2).mT.reshape(*inputs.shape[:-1], -1)


class GridDecoder(nn.Module):
    r"""Network from the vectors of a grid, as of :class:`GridEncoder`, to parameters of every pixel.

    Args:
        code_dim: Numbers at every place.
        shape: Shape of an image.
        params_per_dim: Numbers that the family takes for every pixel and colour.
        channels: Channels of the convolutions, in the order of the encoder.
        blocks: Residual blocks before each doubling.
        output_bias: Initial bias, as in :class:`MLP`.
    """

    @checked
    def __init__(
        self,
        code_dim: Count,
        shape: Sequence[Count],
        params_per_dim: Count = 1,
        channels: Sequence[Count] = (32, 64),
        *,
        blocks: NonNegative = 0,
        output_bias: Float[Tensor, " outputs"] | None = None,
    ) -> None:
        super().__init__()
        height, width, colours = _image_shape(shape)
        sizes = _sizes(height, width, len(channels))
        self.smallest, self.params_per_dim = sizes[-1], params_per_dim
        self.head = nn.Conv2d(code_dim, channels[-1], 3, padding=1)
        self.layers = _doublings(sizes, channels, params_per_dim * colours, blocks)
        self.bias = _output_bias(params_per_dim * height * width * colours, output_bias)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Parameters, one kind after another, of the pixels row by row."""
        places, numbers = math.prod(self.smallest), self.head.in_channels
        _check_inputs(self, inputs, places * numbers, f", {numbers} at each of {places} places")
        rows = inputs.reshape(-1, places, numbers)
        hidden = self.head(rows.mT.unflatten(2, self.smallest))
        outputs = _by_kind(self.layers(hidden), self.params_per_dim) + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


class CausalTransformer(nn.Module):
    r"""Network from sequences of codes to the logits of every code at every place, given those before it.

    It is a transformer with causal attention (Vaswani et al., *Attention Is All You Need*, 2017), layer norms
    first; at place l it sees codes 1 ... l - 1.

    Args:
        num_codes: K.
        length: L, codes in a sequence.
        width: Numbers at every place.
        layers: Layers of attention and feed-forward.
        heads: Heads of the attention; they share the width.
    """

    @checked
    def __init__(
        self, num_codes: Count, length: Count, width: Count = 64, layers: Count = 2, heads: Count = 4
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share a width of {width}: it must be a multiple")
        self.length = length
        self.first = nn.Parameter(0.02 * torch.randn(1, width))  # stands where no code is yet
        self.codes = nn.Embedding(num_codes, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_codes))
        is_later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("is_later", is_later, persistent=False)

    def forward(self, codes: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch length codes"]:
        """Logits for every sequence along the last axis."""
        if codes.shape[-1] != self.length:
            raise ValueError(
                f"this CausalTransformer is for sequences of {self.length} codes, not {codes.shape[-1]}"
            )
        rows = codes.reshape(-1, self.length)
        before = self.codes(rows[:, :-1])
        hidden = torch.cat([self.first.expand(len(rows), 1, -1), before], 1) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.is_later)
        return self.head(hidden).reshape(*codes.shape, -1)


class WithMissing(nn.Module):
    r"""Network for data with missing numbers: it sees 0 for those that are nan, and which they are.

    Args:
        net: Network that takes twice as many numbers: the data, then 1 for each that was observed, else 0.
    """

    @checked
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Outputs for every datum along the last axis."""
        observed = ~inputs.isnan()
        return self.net(torch.cat([torch.where(observed, inputs, 0.0), observed.to(inputs.dtype)], -1))


class Log1p(nn.Module):
    r"""Network for counts: it sees :math:`\log(1 + \max(x, 0))`; learned pseudo-inputs may fall below 0.

    Args:
        net: Network that takes the logarithms.
    """

    @checked
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Outputs for every datum along the last axis."""
        return self.net(inputs.clamp(min=0).log1p())
