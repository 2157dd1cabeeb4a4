"""The SM clock of the current GPU while it works, by NVML (a part of the driver)."""

import ctypes
import functools

import torch

_SM_CLOCK = 1  # NVML_CLOCK_SM


@functools.cache
def _gpu() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    return nvml, handle


def sm_mhz() -> int | None:
    """None where the driver does not tell."""
    gpu = _gpu()
    if gpu is None:
        return None
    mhz = ctypes.c_uint()
    return None if gpu[0].nvmlDeviceGetClockInfo(gpu[1], _SM_CLOCK, ctypes.byref(mhz)) else mhz.value
