import pytest
import torch
from torch import nn

from pyro_vae.nets import MLP, glorot, small_normal


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
    with pytest.raises(ValueError, match="2 outputs"):
        MLP(3, 2, output_bias=torch.zeros(3))


def test_wrong_input_size_is_explained():
    with pytest.raises(ValueError, match=r"784 numbers.*\(2, 28\)"):
        MLP(784, 2)(torch.zeros(2, 28))
