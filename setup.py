"""Drives CMake, which is the one build: see CMakeLists.txt. Everything static is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str) -> str | None:
    """On PATH, or beside this Python: a virtual environment need not be activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def torch_requirement() -> str:
    """The minor version of torch that this build is bound to: its C++ ABI changes between them."""
    script = ROOT / "cmake" / "torch_info.py"
    result = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    info = dict(line.split("=", 1) for line in result.stdout.splitlines())
    major, minor = info["TORCH_VERSION"].split(".")[:2]
    return f"torch=={major}.{minor}.*"


class CMakeBuild(build_ext):
    def run(self) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            raise SystemExit(
                "nsa_ext is built with CMake 3.18 or newer, which is not here: pip install cmake"
            )
        build = ROOT / self.build_temp
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        options = [f"-DNSA_PYTHON={sys.executable}", *os.environ.get("CMAKE_ARGS", "").split()]
        if ninja is not None:
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *options], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        component = ["--component", "python", "--strip"]
        subprocess.run([cmake, "--install", str(build), "--prefix", str(prefix), *component], check=True)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them


setup(
    ext_modules=[Extension("nsa_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[torch_requirement()],
)
