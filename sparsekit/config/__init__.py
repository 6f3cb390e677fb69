"""The YAML that says which layer and head runs what; what it costs (`costs`); other projects' files (`convert`)."""

from __future__ import annotations

from sparsekit.config.budget import Budget, MeasuredOn
from sparsekit.config.facts import ArchFacts, ModelFacts, rope_theta_of
from sparsekit.config.giving_back import give_back
from sparsekit.config.layers import LayerPatterns, Reused
from sparsekit.config.ranges import format_range, parse_range
from sparsekit.config.reuse import Reuse
from sparsekit.config.schema import ResolvedConfig, SparseConfig, load
from sparsekit.config.strict_yaml import parse_yaml

__all__ = [
    "ArchFacts",
    "Budget",
    "LayerPatterns",
    "MeasuredOn",
    "ModelFacts",
    "ResolvedConfig",
    "Reuse",
    "Reused",
    "SparseConfig",
    "format_range",
    "give_back",
    "load",
    "parse_range",
    "parse_yaml",
    "rope_theta_of",
]
