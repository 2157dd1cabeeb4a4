"""tools/sanitize.py reads what racecheck prints; what it cannot read must not count as clean."""

import importlib.util
import sys
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
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
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


INFO = """\
========= Info: Race reported between Write access at void nsa::store(int)+0x9c0 in tile.cuh:90
=========     and Write access at void nsa::fill(int)+0x9c0 in tile.cuh:90 [4 hazards]
"""


def test_writes_of_the_same_value_are_no_race(sanitize) -> None:
    assert sanitize.reported_pairs(INFO + REPORT) == sanitize.reported_pairs(REPORT)
    assert sanitize.understands(INFO + REPORT.replace("1 hazard ", "2 hazards "))


def test_nothing_reported(sanitize) -> None:
    assert sanitize.understands("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")


LAUNCHES = """\
========= Launch #0 (filtered: excluded by name)
=========   Kernel: void at::native::fill(T1 *)
=========   Grid:   (1, 1, 1)
========= Launch #1
=========   Kernel: _ZN3nsa4cuda12_GLOBAL__N__21decode_merge_portableI13__nv_bfloat16Li64EEEvNS_6ParamsE
=========   Grid:   (1, 1, 1)
========= Launch #2
=========   Kernel: nsa::cuda::append_store_portable(nsa::Params)
"""


def test_launches_that_were_checked(sanitize) -> None:
    assert sanitize.checked_launches(LAUNCHES) == {"decode_merge_portable": 1, "append_store_portable": 1}


@pytest.fixture
def run(sanitize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the tool with a compute-sanitizer that prints this and exits so: status, what was printed."""

    def run(prints: str, code: int | str, *options: str) -> tuple[int, str]:
        fake = tmp_path / "compute-sanitizer"
        fake.write_text(f"#!/bin/sh\ncat <<'END'\n--dump-kernel-launches\n{prints}END\nexit {code}\n")
        fake.chmod(0o755)
        (tmp_path / "tests").touch()
        monkeypatch.setattr("shutil.which", lambda name: str(fake))
        monkeypatch.setattr("sys.argv", ["sanitize.py", "--catch2", str(tmp_path / "tests"), *options])
        sanitize.sanitizer.cache_clear()
        status = sanitize.main()
        return status, capsys.readouterr().out

    return run


def clean(launches: int) -> str:
    """The ends of a clean racecheck and of a clean memcheck, which counts listed launches as errors."""
    return (
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
        f"========= ERROR SUMMARY: {launches} errors\n"
    )


CLEAN = clean(3)


def test_a_clean_run_passes(run) -> None:
    status, printed = run(LAUNCHES + CLEAN, 0, "--jobs", "3")
    assert status == 0
    assert "memcheck of pytest: 2 launches" in printed
    assert "racecheck of decode_: 2 launches, 0 reports" in printed


@pytest.mark.parametrize(
    ("prints", "code", "options"),
    [
        (clean(0), 0, ["memcheck"]),  # no launch
        (LAUNCHES.partition("========= Launch #1")[0] + clean(1), 0, ["synccheck"]),  # none that was checked
        (LAUNCHES + CLEAN, 9, ["memcheck"]),
        (LAUNCHES + clean(4), 0, ["memcheck"]),
        (LAUNCHES, 0, ["racecheck", "--kernel", "decode_"]),  # cut off
        (LAUNCHES + REPORT, 0, ["racecheck", "--kernel", "decode_"]),
    ],
    ids=["no_launch", "all_filtered", "tests_fail", "errors", "cut_off", "race"],
)
def test_failures(run, prints: str, code: int, options: list[str]) -> None:
    status, printed = run(prints, code, *options)
    assert status == 1
    assert "FAILED" in printed


def test_a_name_of_no_kernel_is_refused(run) -> None:
    with pytest.raises(SystemExit):
        run(LAUNCHES + CLEAN, 0, "racecheck", "--kernel", "no_such_kernel")


def test_a_check_that_takes_too_long_fails(run) -> None:
    status, printed = run(LAUNCHES, "$([ $# = 1 ] || sleep 60)", "memcheck", "--seconds", "0.5")
    assert status == 1
    assert "it took too long" in printed


@pytest.mark.parametrize(
    ("count", "found"), [(3, []), (5, ["2 errors"]), (None, ["its report cannot be read"])]
)
def test_listed_launches_are_no_errors(sanitize, count: int | None, found: list[str]) -> None:
    summary = "" if count is None else f"========= ERROR SUMMARY: {count} errors\n"
    assert sanitize.errors(LAUNCHES + summary) == found
