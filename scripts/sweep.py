"""Train many configurations, several at once, and rank them by log p(x).

    python scripts/sweep.py sweeps/priors --vary prior=standard_normal,vamp latent_dim=10,20 --epochs 50

The same as ``pyro-vae sweep``.
"""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main("sweep")
