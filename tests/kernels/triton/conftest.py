"""Triton's kernels run in its interpreter where there is no GPU; it is chosen when a kernel is defined."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
