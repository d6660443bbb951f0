"""Fixtures of the tests of divergences."""

from tests.inference.conftest import unchecked_types

__all__ = ["unchecked_types"]
