"""A CUDA tensor on a localattn that was built for the CPU alone; started by test_emulated_cuda.py."""

import os

import pytest
import torch

import localattn


def test_refusal_says_what_to_install():
    torch.ops.load_library(os.environ["LOCALATTN_TEST_EMULATED_CUDA"])
    x = torch.ops.emulated_cuda.place(torch.randn(1, 6, 6, 1, 8), 0)
    with pytest.raises(NotImplementedError, match="install a localattn package for CUDA"):
        localattn.local_attention(x, x, x, 3)
    on_cpu = x.cpu()
    assert localattn.local_attention(on_cpu, on_cpu, on_cpu, 3).shape == x.shape
