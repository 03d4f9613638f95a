"""The ways of a state dict to a file and back."""

import torch
from safetensors.torch import load_file, save_file


def through_torch_save(state, path):
    """Return what torch reads from the file that it writes."""
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors(state, path):
    """Return what safetensors reads from the file that it writes."""
    save_file(state, path)
    return load_file(path)
