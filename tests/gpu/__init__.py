"""Tests that need an NVIDIA GPU: every CUDA kernel against the CPU's scalar one, and the layers on CUDA."""
