"""Kernels in C++ for a CPU: what PyTorch's operators compute, up to rounding, in less time."""
