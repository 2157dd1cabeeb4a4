"""Fixtures and markers of every test."""

import os
from collections.abc import Iterator

# Threads that wait for each other sleep: with spinning ones, thousands of small calls take many times as long
# as soon as the machine does anything else. Read when torch is loaded, so this comes first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cases import CUDA_PATHS, Case


def cuda_reason() -> str | None:
    """Why tests on a GPU cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    import nsa_ext

    if not any(row["built"] for row in nsa_ext.support_matrix() if row["device"] == "cuda"):
        return "nsa_ext has no CUDA kernels"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = cuda_reason() if any("gpu" in item.keywords for item in items) else None
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if isinstance(parameters.get("case"), Case):
            parameters["case"] = parameters["case"].on_cuda()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forced_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker `portable` forces the portable CUDA kernels; without it, the best path of the GPU runs."""
    if request.node.get_closest_marker("portable"):
        monkeypatch.setenv("NSA_CUDA_PATH", "portable")


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """Unwritten elements show: deterministic mode fills new tensors with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CUDA_PATHS)
def cuda_path(request: pytest.FixtureRequest) -> str:
    """For tests that run on both paths of a GPU."""
    return request.param
