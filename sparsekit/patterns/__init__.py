"""Every pattern, one file each. Importing this package registers them; a new one adds a file and a line here."""

from sparsekit.patterns.a_shape import AShape
from sparsekit.patterns.base import (
    DynamicPattern,
    Pattern,
    StaticPattern,
    parse_pattern,
    pattern_class,
    pattern_names,
    static_plan,
)
from sparsekit.patterns.dense import Dense
from sparsekit.patterns.triangle import Triangle
from sparsekit.patterns.union import Union

__all__ = [
    "AShape",
    "Dense",
    "DynamicPattern",
    "Pattern",
    "StaticPattern",
    "Triangle",
    "Union",
    "parse_pattern",
    "pattern_class",
    "pattern_names",
    "static_plan",
]
