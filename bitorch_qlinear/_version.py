"""The version, which pyproject.toml, setup.py and the shared objects take from here."""

__version__ = "0.1.0"
