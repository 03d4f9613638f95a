"""Train, pack and time a binary classifier of handwritten digits: ``python -m examples.digits``."""
