"""Outputs and gradients of a layer, however it is called."""

import torch


def results(function, layer, x, g):
    """Return the output of a function that calls the layer, and the gradients of x and of the layer's parameters."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return (y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], g))
