"""Draw a run: learning curves, reconstructions, samples, latent space, log p(x).

    python scripts/plot.py runs/mnist

The same as ``pyro-vae plot``.
"""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main("plot")
