"""Loads the operator library into torch, once, when nsa_ext is imported."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load_operators() -> None:
    """Make ``torch.ops.nsa`` available, or raise an ImportError that says what to do."""
    library = _PACKAGE / "libnsa_ops.so"
    if not library.exists():
        raise ImportError(f"{library} does not exist: build nsa_ext first (`make build` or `pip install .`)")
    from nsa_ext._built_with import TORCH_VERSION

    if _minor(TORCH_VERSION) != _minor(torch.__version__):
        raise ImportError(
            f"nsa_ext was built with torch {TORCH_VERSION}, but torch {torch.__version__} is installed: "
            f"install torch {_minor(TORCH_VERSION)} or build nsa_ext again"
        )
    torch.ops.load_library(str(library))
