"""Conversions of whole models: making layers binary, packing and unpacking them, and reports of what is done."""

from .binarize import BinarizeReport, LayerChoice, binarize, explain_binarize
from .packing import pack, unpack
from .report import LayerReport, Report, explain

__all__ = [
    "BinarizeReport",
    "LayerChoice",
    "LayerReport",
    "Report",
    "binarize",
    "explain",
    "explain_binarize",
    "pack",
    "unpack",
]
