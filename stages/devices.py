"""Which device and which dtype to compute with, when the configuration says `auto`.

Both phases use it: phase 1 for the teacher, phase 2 for the student. `resolve_device(name)` and
`resolve_dtype(name, device)` are the whole interface; each turns a configuration value into a torch object.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional

from storage.errors import UsageError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: auto, cpu, cuda, cuda:N or mps. auto prefers cuda, then mps, then cpu.

    Raises:
        UsageError: there is no such device, or this machine lacks it.
    """
    if name == "auto":
        available = [kind for kind, present in _accelerators().items() if present]
        return torch.device(available[0] if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {name!r}", where="device", fix="use auto, cpu, cuda, cuda:N or mps"
        ) from error
    usable = device.type == "cpu" or _accelerators().get(device.type, False)
    if usable and device.type == "cuda" and device.index is not None:
        usable = device.index < torch.cuda.device_count()
    if not usable:
        raise UsageError(f"device {name!r} is not available here", where="device", fix="set device: auto, or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; auto is bfloat16 where the device computes in it natively, else float32.

    Raises:
        UsageError: `name` is not auto, float32, bfloat16 or float16.
    """
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", where="dtype", fix=f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_native_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 matrices faster than float32 ones.

    On a CPU that takes dot-product instructions (AVX512-BF16, AMX, Arm BF16): measured 2.5 to 4 times float32 with
    them. Without them bfloat16 is emulated and slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = _cpu_capabilities()
        native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return native and _computes_in_bfloat16()
    return False


@cache
def _computes_in_bfloat16() -> bool:
    """Try what a model does most, at the smallest sizes at which torch takes its special ways on a CPU.

    What the processor can do is not what torch does with it: ATen and oneDNN choose their instructions apart, and where
    ATEN_CPU_CAPABILITY lowers the one alone, attention asks it for a kernel of the other that it lacks.
    """
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            states_BHTD = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16, requires_grad=True)
            weight_OD = torch.ones(64, 64, dtype=torch.bfloat16)
            attended_BHTD = functional.scaled_dot_product_attention(
                states_BHTD, states_BHTD, states_BHTD, is_causal=True
            )
            functional.linear(attended_BHTD, weight_OD).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that configurations and plans use, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _accelerators() -> dict[str, bool]:
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def _cpu_capabilities() -> dict[str, Any]:
    # torch 2.10 to 2.12 know only a private test for x86.
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
