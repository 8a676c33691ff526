"""Kernels in C++ for a CPU; what is in them is faster than torch's, and the same."""
