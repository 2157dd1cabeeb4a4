"""Prints what the build must know about this interpreter and its torch, one NAME=value per line."""

import sys
import sysconfig
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(
        "nsa_ext is built against the torch of the environment that it is built for, "
        f"and {sys.executable} has none ({error}). Install it first (pip install torch==2.11.0); "
        "with a front end that builds in an environment of its own (python -m build, uv), "
        "switch that isolation off."
    )

root = Path(torch.__file__).parent
openmp = sorted([*(root / "lib").glob("libgomp*.so*"), *(root / "lib").glob("libiomp5*.so*")])
info = {
    "TORCH_VERSION": torch.__version__,
    "TORCH_CUDA_VERSION": torch.version.cuda or "",
    "TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
    "TORCH_INCLUDE": root / "include",
    "TORCH_LIB": root / "lib",
    "TORCH_OPENMP": openmp[0] if openmp else "",
    "PYTHON_INCLUDE": sysconfig.get_path("include"),
    "PYTHON_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
}
print(*(f"{name}={value}" for name, value in info.items()), sep="\n")
