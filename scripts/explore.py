"""Play with a trained run in the browser: drag through its latent plane, draw, erase, complete.

    python scripts/explore.py runs/mnist

The same as ``pyro-vae explore``.
"""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main("explore")
