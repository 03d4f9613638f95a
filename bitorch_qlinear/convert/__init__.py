"""Conversions of whole models: pack and unpack their binary layers, and a report of what computes them."""

from .packing import pack, unpack
from .report import LayerReport, Report, explain

__all__ = ["LayerReport", "Report", "explain", "pack", "unpack"]
