"""Auto-Encoding Variational Bayes in Pyro, with log-likelihoods one can trust.

The names are those of the stub beside this file. They are imported when they are first used, so that
``import pyro_vae`` and ``--help`` cost nothing.
"""

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name in __all__:
        return _load(name)
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    from pyro_vae.errors import nearest

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{nearest(name, __all__)}")
