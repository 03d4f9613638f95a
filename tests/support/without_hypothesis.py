"""Stands in for hypothesis where it is not installed, as on a GPU machine: its tests are skipped, all others run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Anything:
    """Whatever is asked of strategies while a module is imported."""

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __getattr__(self, _: str) -> Anything:
        return self


class Settings:
    """A decorator that changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, test: Any) -> Any:
        return test

    register_profile = load_profile = classmethod(lambda *_, **__: None)


def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="hypothesis is not installed")


def install() -> None:
    """From now on `import hypothesis` finds this."""
    module: Any = ModuleType("hypothesis")
    module.given, module.settings, module.strategies, module.HealthCheck = given, Settings, Anything(), Anything()
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": module.strategies}
