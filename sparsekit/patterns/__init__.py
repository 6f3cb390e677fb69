"""Every pattern, one file each. Importing this package registers them; a new one adds a file and a line here."""

from sparsekit.patterns.a_shape import AShape
from sparsekit.patterns.base import (
    DynamicPattern,
    Pattern,
    StaticPattern,
    bounded,
    parse_pattern,
    pattern_class,
    pattern_names,
    shared_correction,
    static_plan,
)
from sparsekit.patterns.block_topk import BlockTopK
from sparsekit.patterns.blocks import BlockPattern, Blocks
from sparsekit.patterns.dense import Dense
from sparsekit.patterns.flashprefill import FlashPrefill
from sparsekit.patterns.flexprefill import FlexPrefill
from sparsekit.patterns.prism import Prism
from sparsekit.patterns.s2o import S2O
from sparsekit.patterns.triangle import Triangle
from sparsekit.patterns.union import DynamicUnion, Union
from sparsekit.patterns.vertical_slash import VerticalSlash
from sparsekit.patterns.xattention import XAttention

__all__ = [
    "S2O",
    "AShape",
    "BlockPattern",
    "BlockTopK",
    "Blocks",
    "Dense",
    "DynamicPattern",
    "DynamicUnion",
    "FlashPrefill",
    "FlexPrefill",
    "Pattern",
    "Prism",
    "StaticPattern",
    "Triangle",
    "Union",
    "VerticalSlash",
    "XAttention",
    "bounded",
    "parse_pattern",
    "pattern_class",
    "pattern_names",
    "shared_correction",
    "static_plan",
]
