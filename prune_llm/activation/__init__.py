"""Activation sparsity: which inputs of the linears are small enough to skip."""
