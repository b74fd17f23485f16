"""Classifier of real images, by which decoded samples are judged."""

from pathlib import Path
from typing import Any

import study
import torch
from torch import Tensor, nn


def trained(folder: Path, dataset: Any, epochs: int = 3) -> nn.Module:
    """Train a convolutional network from grey images to probabilities of classes, and keep it."""
    from pyro_vae import ConvEncoder, batches

    torch.manual_seed(0)
    num_classes = int(dataset.train.labels.max()) + 1
    net = nn.Sequential(ConvEncoder(dataset.shape, num_classes), nn.Softmax(-1))
    path = folder / f"classifier_{dataset.name}_{len(dataset.train)}.pt"
    minibatches = batches(dataset.train, 100, context=dataset.train.labels)

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.nll_loss((net(x) + 1e-9).log(), labels)

    return study.train_network(path, net, minibatches, loss_of, num_epochs=epochs)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of correct classes."""
    return (torch.cat([net(part).argmax(1) for part in x.split(1000)]) == labels).double().mean().item()
