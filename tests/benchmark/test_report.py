"""Targets in the report: verdicts, with and without a deciding interval."""

import pytest

from tracknet.benchmark.report import render_targets


@pytest.mark.parametrize(
    "relative, interval, verdict",
    [
        (1.24, [0.93, 1.56], "124.0% (at least 98%: undecided)"),
        (0.90, [0.80, 0.99], "90.0% (at least 98%: undecided)"),
        (1.01, [0.985, 1.05], "101.0% (at least 98%: met)"),
        (0.90, [0.85, 0.95], "90.0% (at least 98%: missed)"),
        (0.99, None, "99.0% (at least 98%: undecided)"),
    ],
)
def test_accuracy_is_decided_only_where_its_interval_decides(relative, interval, verdict):
    rows = [{"name": "default"}, {"name": "int8", "relative": relative, "relative_interval": interval}]
    result = {"accuracy": {"rows": rows}, "modes_memory": [{"name": "int8", "share": 0.5}]}
    assert render_targets(result)[-1] == f"| int8 | 50% (at most 50%: met) | at least 1.2x: not measured | {verdict} |"
