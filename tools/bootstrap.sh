#!/usr/bin/env bash
# Makes .venv hold all that building, testing and the examples need. What a system lacks is installed with apt-get where
# that is possible (root on Debian); otherwise the message says what to install.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null

python=${PYTHON:-python3}
torch=${NSA_TORCH_REQUIREMENT:-torch==2.11.0}

say() { echo "bootstrap: $*" >&2; }
die() { say "$*"; exit 1; }

apt_updated=no
apt_install() {
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then return 1; fi
  say "installing $* with apt-get"
  if [[ $apt_updated = no ]]; then apt-get update -qq >&2 && apt_updated=yes; fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# An existing .venv is completed, not replaced.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  command -v "$python" >/dev/null || die "there is no $python: install Python 3.10 or newer"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is older than Python 3.10"
  "$python" -c 'import ensurepip' 2>/dev/null || apt_install python3-venv ||
    die "$python cannot make virtual environments: install python3-venv"
  say "making .venv"
  "$python" -m venv .venv
fi

has_headers() { .venv/bin/python -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null; }
has_headers || { apt_install python3-dev && has_headers; } || die "the headers of this Python are missing: install python3-dev"

command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || [[ -n ${CXX:-} ]] ||
  apt_install g++ || die "there is no C++ compiler: install g++ or clang++"

# Without it, CMake fetches Catch2.
echo '#include <catch2/catch.hpp>' | c++ -x c++ -fsyntax-only - 2>/dev/null ||
  apt_install catch2 || say "Catch2 is not installed, so the build will download it"

tools=()
cmake_is_new_enough() { cmake -E echo ok && [[ $(printf '3.18\n%s\n' "$(cmake --version | awk 'NR == 1 { print $3 }')" | sort -V | head -n 1) = 3.18 ]]; }
cmake_is_new_enough >/dev/null 2>&1 || tools+=("cmake>=3.18")
command -v ninja >/dev/null || tools+=(ninja)

extras=$(.venv/bin/python - <<'PYTHON'
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
requirements = project["build-system"]["requires"][:1]  # setuptools; cmake and ninja may come from the system
for extra in project["project"]["optional-dependencies"].values():
    requirements += extra
print(*dict.fromkeys(requirements), sep="\n")
PYTHON
)
mapfile -t extras <<<"$extras"
say "installing $torch and tools into .venv (the first time, this downloads about 3 GB)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch" "${extras[@]}" "${tools[@]}"

# The same as an editable install, without building anything now: `make build` puts the libraries into nsa_ext/.
.venv/bin/python -c 'import os, pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "nsa_ext_development.pth").write_text(os.getcwd() + "\n")'

touch .venv/.bootstrapped
