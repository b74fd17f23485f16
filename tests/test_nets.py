import pytest
import torch
from torch import nn

from pyro_vae.nets import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    GridDecoder,
    GridEncoder,
    Log1p,
    WithMissing,
    glorot,
    small_normal,
)


def test_mlp_is_the_formula_of_the_paper():
    net = MLP(3, 2, (4,))
    x = torch.randn(5, 3)
    first, last = net.layers[0], net.layers[2]
    expected = torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(net(x), expected)


def test_without_hidden_layers_it_is_linear():
    net = MLP(3, 2, ())
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(net(x + y) - net(y), net(x) - net(torch.zeros(3)))


def test_sizes_and_activation():
    net = MLP(3, 2, (4, 5), activation=nn.ReLU)
    assert [layer.out_features for layer in net.layers[::2]] == [4, 5, 2]
    assert isinstance(net.layers[1], nn.ReLU)


def test_initialisers():
    net = MLP(400, 500, (300,), init=small_normal)
    weights = torch.cat([parameter.flatten() for parameter in net.parameters()])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    net = MLP(400, 500, (300,), init=glorot)
    assert net.layers[0].weight.var().item() == pytest.approx(2 / (400 + 300), rel=0.05)
    assert (net.layers[0].bias == 0).all()


def test_output_bias():
    bias = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(MLP(3, 2, output_bias=bias).layers[-1].bias.detach(), bias)


def test_gated_layers_are_the_formula_of_the_vamp_prior_paper():
    net = MLP(3, 2, (4,), activation=nn.GLU)
    x = torch.randn(5, 3)
    first, last = net.layers[0], net.layers[2]
    both = x @ first.weight.T + first.bias
    hidden = both[:, :4] * torch.sigmoid(both[:, 4:])
    torch.testing.assert_close(net(x), hidden @ last.weight.T + last.bias)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("shape", [(28, 28), (28, 20), (7, 5), (1, 9), (8, 6, 3)])
def test_convolutions_take_images_of_any_size(shape, blocks):
    dim = torch.Size(shape).numel()
    encoder = ConvEncoder(shape, 5, (4, 8, 6), blocks=blocks, context_dim=2)
    decoder = ConvDecoder(5, shape, 3, (4, 8, 6), blocks=blocks)
    for leading in (), (2,), (3, 2):
        codes = encoder(torch.rand(*leading, dim + 2))
        assert codes.shape == (*leading, 5)
        assert decoder(codes).shape == (*leading, 3 * dim)
    rows = torch.rand(4, dim + 2)
    torch.testing.assert_close(encoder(rows.expand(3, 4, -1))[1], encoder(rows))
    (encoder(rows).sum() + decoder(torch.randn(4, 5)).square().sum()).backward()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        assert parameter.grad.abs().sum() > 0


def test_convolutions_see_pixels_where_they_are():
    """A pixel moves outputs around its own place in the flattened image, in the same colour order."""
    shape = (12, 10, 3)
    decoder = ConvDecoder(1, shape, 2, (4,))
    with torch.no_grad():
        decoder.layers[-1].weight.zero_()
        decoder.layers[-1].bias.copy_(torch.arange(6.0))  # kind 0: colours 0 1 2, kind 1: colours 3 4 5
    outputs = decoder(torch.zeros(1)).reshape(2, *shape)
    assert outputs.reshape(2, -1, 3)[:, 0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]

    encoder = ConvEncoder(shape, 1, (1,))
    image = torch.zeros(shape)
    image[4, 6, 2] = 1.0
    hidden = []
    encoder.layers[0].register_forward_hook(lambda module, given, output: hidden.append(given[0]))
    encoder(image.flatten())
    assert hidden[0].nonzero().tolist() == [[0, 2, 4, 6]]


def test_the_output_bias_of_convolutions():
    bias = torch.randn(2 * 12)
    decoder = ConvDecoder(3, (4, 3), 2, (4,), output_bias=bias)
    with torch.no_grad():
        for parameter in decoder.layers.parameters():
            parameter.zero_()
    torch.testing.assert_close(decoder(torch.randn(3)), bias)


NO_CHANNELS = "channels are those of the convolutions, at least one"


@pytest.mark.parametrize(
    ("words", "take"),
    [
        ("2 outputs", lambda: MLP(3, 2, output_bias=torch.zeros(3))),
        (r"784 numbers.*\(2, 28\)", lambda: MLP(784, 2)(torch.zeros(2, 28))),
        ("24 outputs", lambda: ConvDecoder(3, (4, 3), 2, (4,), output_bias=torch.zeros(5))),
        (r"\(64,\): take an MLP", lambda: ConvEncoder((64,), 5)),
        (
            r"16 numbers of an image .* and 0 of a context.*\(3, 15\)",
            lambda: ConvEncoder((4, 4), 5)(torch.zeros(3, 15)),
        ),
        (r"move the colours to the last axis", lambda: ConvEncoder((3, 8, 10), 5)),
        (NO_CHANNELS, lambda: ConvEncoder((4, 4), 5, ())),
        (NO_CHANNELS, lambda: ConvDecoder(5, (4, 4), 1, ())),
        (NO_CHANNELS, lambda: GridEncoder((4, 4), 5, ())),
        (NO_CHANNELS, lambda: GridDecoder(5, (4, 4), 1, ())),
    ],
)
def test_wrong_sizes_are_explained(words, take):
    with pytest.raises(ValueError, match=words):
        take()


def test_missing_numbers_are_seen_as_zero_and_as_missing():
    net = WithMissing(nn.Identity())
    x = torch.tensor([[1.0, float("nan"), 3.0]])
    assert net(x).tolist() == [[1.0, 0.0, 3.0, 1.0, 0.0, 1.0]]


def test_counts_are_seen_by_their_logarithms():
    # Learned pseudo-inputs may fall below -1.
    seen = Log1p(nn.Identity())(torch.tensor([0.0, 9.0, -1.5]))
    torch.testing.assert_close(seen, torch.tensor([1.0, 10.0, 1.0]).log())
