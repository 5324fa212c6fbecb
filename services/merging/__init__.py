"""Merging: a base model and adapters become one model."""

from services.merging import blas as blas  # before anything else loads numpy: it asks for numpy's kernels
