"""``python -m pyro_vae``: the commands of the laboratory."""

from pyro_vae.lab import cli

if __name__ == "__main__":
    cli.main()
