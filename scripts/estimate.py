"""Estimate log p(x) of a trained run in one or several ways, with errors, bounds and a verdict.

    python scripts/estimate.py runs/mnist --num-samples 5000 --limit 1000
    python scripts/estimate.py runs/mnist --method all --limit 100

The same as ``pyro-vae estimate``.
"""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main("estimate")
