"""`dtype: auto` means a dtype that torch computes in, whatever instructions its libraries are told to leave alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from stages import devices

PROGRAM = """
import torch
from torch.nn import functional
from stages.devices import resolve_dtype
dtype = resolve_dtype("auto", torch.device("cpu"))
for tokens in (9, 64, 512):
    states = torch.randn(1, 4, tokens, 64, dtype=dtype, requires_grad=True)
    attended = functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    functional.linear(attended, torch.randn(96, 64, dtype=dtype)).sum().backward()
    assert states.grad.isfinite().all()
print(dtype)
"""
LOWERED = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
]


@pytest.mark.parametrize("lowered", LOWERED, ids=lambda one: ",".join(f"{key}={one[key]}" for key in one))
def test_auto_computes_where_the_libraries_disagree(lowered: dict[str, str]) -> None:
    """Only a processor with AMX fails without the trial: elsewhere torch has a way for each of these."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **lowered}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("torch.bfloat16", "torch.float32")


def test_auto_falls_back_where_bfloat16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_a_kernel(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("pack_vnni2 is only supported when avx512 is supported")  # what torch says then

    monkeypatch.setattr(devices, "_cpu_capabilities", lambda: {"amx_bf16": True})
    devices._computes_in_bfloat16.cache_clear()
    assert devices.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lacks_a_kernel)
    devices._computes_in_bfloat16.cache_clear()
    try:
        assert devices.resolve_dtype("auto", torch.device("cpu")) == torch.float32
    finally:
        devices._computes_in_bfloat16.cache_clear()
