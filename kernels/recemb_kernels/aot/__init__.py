"""Ahead-of-time report on the Triton kernels: what each shipped configuration costs, read without a GPU."""
