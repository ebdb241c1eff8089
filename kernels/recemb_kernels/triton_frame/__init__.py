"""Look-ups on GPU: what the Triton kernels of all ops share, and the group that runs them."""
