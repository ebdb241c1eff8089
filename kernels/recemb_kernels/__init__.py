"""Kernels of recemb: one folder an op, each with its reference, its native CPU code and its derivation."""
