"""A replacement for hypothesis if it is not installed: its tests are skipped, and all others in the same files run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Anything:
    """An object that has every attribute and can be called, as strategies are while a module is imported."""

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __getattr__(self, _: str) -> Anything:
        return self


class Settings:
    """A replacement for the decorator hypothesis.settings, which changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, test: Any) -> Any:
        return test

    register_profile = load_profile = classmethod(lambda *_, **__: None)


def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="hypothesis is not installed")


def install() -> None:
    """Let `import hypothesis` find this replacement from now on."""
    module: Any = ModuleType("hypothesis")
    module.given, module.settings, module.strategies, module.HealthCheck = given, Settings, Anything(), Anything()
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": module.strategies}
