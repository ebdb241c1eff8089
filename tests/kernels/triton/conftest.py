"""Triton kernels run in Triton's interpreter, on CPU tensors, unless the environment says otherwise."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
