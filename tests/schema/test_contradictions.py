"""Constraints that no row, or no row of some kind, could meet are refused when the schema is read."""

from __future__ import annotations

import pytest

from synthward.engine.errors import SchemaError
from synthward.schema.load import parse_schema

HEAD = (
    """
version = 1
name = "t"
"""
    + "".join(
        f'[columns.{name}]\nkind = "categorical"\ncategories = ["0", "1"]\nmissing = true\n' for name in "abc"
    )
    + "".join(f'[columns.{name}]\nkind = "integer"\nmin = 0\nmax = 10\n' for name in "xyz")
)


def implies(when: str, value: object, then: str, result: object) -> str:
    return (
        f'[[constraints]]\nkind = "implies"\nif = {{ column = "{when}", equals = {value} }}\n'
        f'then = {{ column = "{then}", equals = {result} }}\n'
    )


def le(left: str, right: str, strict: bool = False) -> str:
    return (
        f'[[constraints]]\nkind = "le"\nleft = "{left}"\nright = "{right}"\nstrict = {str(strict).lower()}\n'
    )


CONTRADICTORY = {
    "two values": implies("a", "'1'", "b", "'1'") + implies("a", "'1'", "b", "'0'"),
    "a chain back": implies("a", "'1'", "b", "'1'") + implies("b", "'1'", "a", "'0'"),
    "two conditions": implies("a", "'1'", "c", "'1'") + implies("b", "'1'", "c", "'0'"),
    "a circle": le("x", "y", True) + le("y", "z", True) + le("z", "x", True),
    "values against an order": le("x", "y") + implies("a", "'1'", "x", 5) + implies("a", "'1'", "y", 4),
    "along a chain": le("x", "y", True)
    + le("y", "z", True)
    + implies("a", "'1'", "x", 5)
    + implies("b", "'1'", "z", 6),
}


@pytest.mark.parametrize("name", CONTRADICTORY)
def test_refused(name):
    with pytest.raises(SchemaError, match="contradict"):
        parse_schema(HEAD + CONTRADICTORY[name])


POSSIBLE = {
    "conditions that exclude each other": implies("a", "'1'", "b", "'1'") + implies("a", "'0'", "b", "'0'"),
    "a circle of equals": le("x", "y") + le("y", "x"),
    "a chain with room": le("x", "y", True)
    + le("y", "z", True)
    + implies("a", "'1'", "x", 5)
    + implies("b", "'1'", "z", 7),
    "the same said twice": implies("a", "'1'", "b", "'1'") + implies("c", "'1'", "b", "'1'"),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_accepted(name):
    parse_schema(HEAD + POSSIBLE[name])


def test_bounds_that_never_meet():
    low = '[columns.l]\nkind = "integer"\nmin = 20\nmax = 30\n'
    with pytest.raises(SchemaError, match="can never hold"):
        parse_schema(HEAD + low + le("l", "x"))
