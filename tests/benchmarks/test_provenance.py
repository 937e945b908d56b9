"""Where the numbers of a table come from."""

from dataclasses import replace

from benchmarks.provenance import provenance
from benchmarks.results_file import Results

RUN = Results("b", "2026-01-02T00:00:00Z", "abc1234", "GPU", {"torch": "2.13.0", "triton": None}, "python -m b")


def test_one_run_is_a_line_however_often_it_comes():
    assert provenance([RUN, replace(RUN, date="2026-01-02T01:00:00Z")]) == (
        "Measured 2026-01-02 on GPU (torch 2.13.0), commit abc1234: `python -m b`"
    )


def test_several_are_a_folded_list_oldest_first():
    others = [replace(RUN, command="python -m b --c"), replace(RUN, date="2026-01-01T00:00:00Z", commit="def5678")]
    assert provenance([RUN, *others]).splitlines() == [
        "<details><summary>Measured on GPU (torch 2.13.0) by 3 commands</summary>",
        "",
        "- 2026-01-01, commit def5678: `python -m b`",
        "- 2026-01-02, commit abc1234: `python -m b`",
        "- 2026-01-02, commit abc1234: `python -m b --c`",
        "",
        "</details>",
    ]


def test_devices_stand_apart():
    text = provenance([RUN, replace(RUN, device="CPU")])
    assert text.split("\n\n") == [
        f"Measured 2026-01-02 on {device} (torch 2.13.0), commit abc1234: `python -m b`" for device in ("GPU", "CPU")
    ]
