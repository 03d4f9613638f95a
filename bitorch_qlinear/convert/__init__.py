"""Conversions of whole models: packing and unpacking their binary layers, and a report of what computes them."""

from .fuse import Folded
from .packing import pack, unpack
from .report import LayerReport, Report, explain

__all__ = ["Folded", "LayerReport", "Report", "explain", "pack", "unpack"]
