"""Native Sparse Attention (arXiv 2502.11089) for PyTorch: C++ and CUDA operators and modules."""

import importlib
from types import ModuleType
from typing import Any

from nsa_ext._load import load_operators

load_operators()

from nsa_ext import ops, reference  # noqa: E402  (everything below needs the operators)
from nsa_ext._C import build_info, support_matrix  # noqa: E402
from nsa_ext.cache import LayerCache, NSACache  # noqa: E402
from nsa_ext.compression import BlockCompression  # noqa: E402
from nsa_ext.config import NSAConfig  # noqa: E402
from nsa_ext.functional import NSAInfo, nsa_attention  # noqa: E402
from nsa_ext.modules import NativeSparseAttention  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BlockCompression",
    "LayerCache",
    "NSACache",
    "NSAConfig",
    "NSAInfo",
    "NativeSparseAttention",
    "build_info",
    "diagnostics",
    "nsa_attention",
    "ops",
    "reference",
    "support_matrix",
]


def __getattr__(name: str) -> Any:
    if name == "diagnostics":
        return _load_diagnostics()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _load_diagnostics() -> ModuleType:
    """Plotting needs matplotlib, which only the extra [train] installs, so nobody else imports it."""
    return importlib.import_module("nsa_ext.diagnostics")
