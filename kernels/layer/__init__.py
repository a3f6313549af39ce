"""The differentiable layer: operands in, gradients out."""
