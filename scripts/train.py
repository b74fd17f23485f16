"""Train a VAE, say how good it is, and keep the run in a folder.

    python scripts/train.py
    python scripts/train.py --data mnist --latent-dim 20 --epochs 30 --out runs/mnist
    python scripts/train.py --resume runs/mnist

The same as ``pyro-vae train``.
"""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main("train")
