"""The version: the one place that says it (pyproject.toml, setup.py and the shared objects read it here)."""

__version__ = "0.1.0"
