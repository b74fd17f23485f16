"""A classifier of real images, by which decoded samples are judged."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def trained(folder: Path, dataset: Any, epochs: int = 3) -> nn.Module:
    """A convolutional network from images to probabilities of classes, trained on grey images; kept."""
    from pyro_vae import ConvEncoder, batches
    from pyro_vae.files import write_atomically
    from pyro_vae.progress import progress_bar

    torch.manual_seed(0)
    num_classes = int(dataset.train.labels.max()) + 1
    net = nn.Sequential(ConvEncoder(dataset.shape, num_classes), nn.Softmax(-1))
    path = folder / f"classifier_{dataset.name}_{len(dataset.train)}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    minibatches = batches(dataset.train, 100, context=dataset.train.labels)
    with progress_bar(epochs * len(minibatches), "classifier", "step", show=True) as bar:
        for _ in range(epochs):
            for x, labels in minibatches:
                loss = nn.functional.nll_loss((net(x) + 1e-9).log(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
    path.parent.mkdir(parents=True, exist_ok=True)
    import io

    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    write_atomically(buffer.getvalue(), path)
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of right classes."""
    return (torch.cat([net(part).argmax(1) for part in x.split(1000)]) == labels).double().mean().item()
