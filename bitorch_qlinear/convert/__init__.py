"""Conversions of whole models: packing and unpacking their binary layers, and a report of what computes them."""

from .packing import pack, unpack
from .report import LayerReport, Report, explain

__all__ = ["LayerReport", "Report", "explain", "pack", "unpack"]
