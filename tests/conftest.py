"""Fixtures and markers of every test."""

import os

# Threads that wait for each other sleep: with spinning ones, thousands of small calls take many times as long
# as soon as the machine does anything else. Read when torch is loaded, so this comes first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cases import Case


def cuda_reason() -> str | None:
    """Why tests on a GPU cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    import nsa_ext

    if not any(row["built"] for row in nsa_ext.support_matrix() if row["device"] == "cuda"):
        return "nsa_ext has no CUDA kernels"
    return None


# Files that need nothing but the forward on a GPU; what else is marked `gpu` differentiates.
FORWARD_ON_CUDA = ("test_cuda_forward.py", "test_cuda_runtime.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = cuda_reason() if any("gpu" in item.keywords for item in items) else None
    for item in items:
        if "gpu" not in item.keywords:
            continue
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.path.name not in FORWARD_ON_CUDA:
            item.add_marker(pytest.mark.skip(reason="the backward has no CUDA kernels yet"))
        elif isinstance(case, Case) and not case.runs_natively_on_cuda():
            item.add_marker(pytest.mark.skip(reason="not a shape of the CUDA support table"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
