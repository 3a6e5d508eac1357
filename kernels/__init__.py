"""Stateless tensor functions: each operation as a plain-torch reference and as compiled kernels."""
