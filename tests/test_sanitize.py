"""tools/sanitize.py reads what racecheck prints; what it cannot read must not count as clean."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "sanitize.py"

REPORT = """\
========= Error: Race reported between Read access at void nsa::load<(int)64>(const T1 &, int)::[lambda(int)]\
::operator ()(int) const+0x72f0 in pipeline.cuh:175
=========     and Write access at void nsa::list_tile<(int)3>(int)+0x9c0 in pipeline.cuh:90 [4 hazards]
=========     and Write access at nsa::clear(unsigned int)+0x10 in pipeline.cuh:20 [2 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.fixture(scope="module")
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_of_functions(sanitize) -> None:
    assert sanitize.reported_pairs(REPORT) == [
        frozenset(("load", "list_tile")),
        frozenset(("load", "clear")),
    ]
    assert sanitize.understands(REPORT)


@pytest.mark.parametrize(
    "output",
    [
        REPORT.replace(" in pipeline.cuh:175", ""),  # a build without line numbers
        REPORT.replace(" in pipeline.cuh:90", "").replace(" in pipeline.cuh:20", ""),
        REPORT.replace("Race reported", "Race seen"),
        REPORT.partition("========= RACECHECK")[0],  # cut off
        "",
    ],
)
def test_what_cannot_be_read_is_not_clean(sanitize, output: str) -> None:
    assert not sanitize.understands(output)


def test_nothing_reported(sanitize) -> None:
    assert sanitize.understands("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
