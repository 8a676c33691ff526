"""Kernels in C++ for a CPU: what torch's operators compute, up to rounding, in less time."""
