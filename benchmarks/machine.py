"""What a measurement ran on: enough to compare it with another one, nothing that names a host or a path."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from implementations.nsa import ROOT, load_nsa_ext


def describe_machine(device: str) -> dict:
    """The "machine" entry of a results file."""
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.system(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "load_1min": round(os.getloadavg()[0], 2),  # before the run: other work on the machine
        "nsa_ext": _library_info(),
    }
    if device == "cuda":
        machine.update(_gpu())
    return machine


def git_revision() -> str:
    """Short revision of the tree, "-dirty" when tracked files differ from it. Outside git: $NSA_REVISION, or
    the one that the library was built from, or "unknown".
    """
    if _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel") != str(ROOT):
        built = (_library_info() or {}).get("git_revision", "unknown")
        return os.environ.get("NSA_REVISION") or built
    revision = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return revision + ("-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def device_name(device: str) -> str:
    """Folder of a device's results: "cpu", or the GPU's name such as "nvidia-h200"."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _library_info() -> dict | None:
    try:
        info = load_nsa_ext().build_info()
    except ImportError:
        return None
    return {key: info[key] for key in ("version", "git_revision", "compiler", "cpu_isa", "cuda_version")}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    queries = {
        "driver": "driver_version",
        "sm_mhz": "clocks.sm",
        "max_sm_mhz": "clocks.max.sm",
        "memory_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
    }
    query = ",".join(queries.values())
    values = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0").split(
        ", "
    )
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(queries, values, strict=False)),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
