"""What an installed package promises: light imports, facts about the build, libraries that can be moved."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_ext

PACKAGE = Path(nsa_ext.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("*.so"))
OPERATORS = {
    "compress",
    "compressed_attention",
    "block_scores",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
    "append_kv",
    "decode_attention",
    "attention",
}


def python(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_only_torch() -> None:
    """With every other dependency of the extras made unimportable."""
    hidden = ("matplotlib", "tensorboard", "tqdm", "hypothesis", "pytest", "pandas", "transformers")
    python(f"import sys\nfor name in {hidden}: sys.modules[name] = None\nimport nsa_ext\nnsa_ext.NSAConfig")


def test_import_loads_no_plotting() -> None:
    loaded = python(
        "import sys, torch; before = set(sys.modules); import nsa_ext; print(*set(sys.modules) - before)"
    )
    assert not {name.split(".")[0] for name in loaded.split()} & {
        "matplotlib",
        "tqdm",
        "tensorboard",
        "transformers",
    }


def test_import_keeps_the_threads_and_the_seed() -> None:
    program = (
        "import torch; torch.manual_seed(1); before = torch.get_num_threads(), torch.initial_seed();"
        "import nsa_ext; assert before == (torch.get_num_threads(), torch.initial_seed())"
    )
    python(program)


def test_importing_twice_registers_once() -> None:
    python("import nsa_ext, importlib; importlib.reload(nsa_ext); import torch; torch.ops.nsa.attention")


def test_build_info() -> None:
    info = nsa_ext.build_info()
    assert info["version"] == nsa_ext.__version__
    assert info["torch_version"].split("+")[0].split(".")[:2] == torch.__version__.split(".")[:2]
    assert isinstance(info["with_cuda"], bool)
    assert (info["cuda_version"] is None) == (not info["with_cuda"])
    assert info["cpu_isa"]["active"] in info["cpu_isa"]["compiled"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", info["git_revision"])


def test_support_matrix() -> None:
    rows = nsa_ext.support_matrix()
    on_cpu = [row for row in rows if row["device"] == "cpu"]
    assert {row["op"] for row in on_cpu} == OPERATORS and len(on_cpu) == len(OPERATORS)
    for row in on_cpu:
        assert set(row["dtypes"]) == {"float32", "float64", "bfloat16"}
        assert row["head_dims"] is None and row["built"] is True and row["path"] == "cpu"
    for row in rows:
        assert row["op"] in OPERATORS and row["device"] in ("cpu", "cuda")
        if row["device"] == "cuda":
            assert set(row["dtypes"]) <= {"bfloat16", "float16"}


def test_support_matrix_is_what_the_checks_say() -> None:
    q = torch.zeros(4, 1, 8, dtype=torch.float16)
    with pytest.raises(ValueError) as error:
        torch.ops.nsa.sliding_window_attention(q, q, q, None, None, 4, 4, 2, 1.0)
    row = next(
        r for r in nsa_ext.support_matrix() if r["op"] == "sliding_window_attention" and r["device"] == "cpu"
    )
    assert all(dtype in str(error.value) for dtype in row["dtypes"])


@pytest.mark.parametrize("active", ["generic", "avx2"])
def test_the_environment_picks_a_lower_instruction_set(active: str) -> None:
    compiled = nsa_ext.build_info()["cpu_isa"]["compiled"]
    if active not in compiled or compiled.index(active) > compiled.index(
        nsa_ext.build_info()["cpu_isa"]["active"]
    ):
        pytest.skip(f"{active} is not built, or not below what this machine has")
    program = (
        f"import os; os.environ['NSA_CPU_ISA'] = {active!r}; import nsa_ext;"
        f"assert nsa_ext.build_info()['cpu_isa']['active'] == {active!r}"
    )
    python(program)


def test_there_are_two_libraries() -> None:
    names = [path.name.split(".")[0] for path in LIBRARIES]
    assert names == ["_C", "libnsa_ops"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_no_absolute_path_in_a_library(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    for paths in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        for path in paths.split(":"):
            assert path.startswith("$ORIGIN"), f"{library.name}: {path}"
    for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        assert "/" not in needed, f"{library.name} needs {needed}"
        assert "libpython" not in needed and "libtorch_python" not in needed, f"{library.name} needs {needed}"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_no_cuda_library_is_needed_at_import(library: Path) -> None:
    """CUDA kernels come with the driver's libraries only through torch, which may have none."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libcuda.so" not in dynamic


def test_the_operators_need_no_python_package() -> None:
    """load_library alone registers every operator."""
    library = PACKAGE / "libnsa_ops.so"
    program = (
        f"import torch; torch.ops.load_library({str(library)!r}); q = torch.randn(9, 2, 4); "
        "o, lse = torch.ops.nsa.sliding_window_attention(q, q, q, None, None, 9, 9, 3, 0.5);"
        "assert o.shape == q.shape"
    )
    python(program)
