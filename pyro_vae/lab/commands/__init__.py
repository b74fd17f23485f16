"""Commands, a module each: ``Arguments`` with the help of every option, ``parse`` and ``main``."""
