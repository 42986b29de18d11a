"""Kernels of the order loop: array-API and Numba, with the same names and signatures."""
