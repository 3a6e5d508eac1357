"""Differentially private generators of synthetic health records."""

__version__ = "0.1.0"
