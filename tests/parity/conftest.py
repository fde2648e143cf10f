"""Collects the errors that the parity tests find into a table: printed at the end, and written with --figures=FILE."""

import json
import pathlib

import pytest

from tests.parity import oracles


def pytest_addoption(parser):
    parser.addoption("--figures", metavar="FILE", help="write the worst error of every parity test file as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Puts the errors of a test into its report, with which they also cross processes."""
    oracles.figures.clear()
    result = yield
    if oracles.figures:
        item.user_properties.append(("parity", (getattr(item.module, "AGAINST", ""), max(oracles.figures))))
    return result


def pytest_terminal_summary(terminalreporter, config):
    worst = {}
    for report in terminalreporter.stats.get("passed", []):
        for _, (against, error) in (p for p in report.user_properties if p[0] == "parity"):
            name = pathlib.Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
            worst[name] = (against, max(error, worst.get(name, (against, 0.0))[1]))
    if not worst:
        return
    terminalreporter.section("worst error of outputs and gradients, over their scale")
    for name, (against, error) in sorted(worst.items()):
        terminalreporter.write_line(f"{name:28} {error:.1e}  {against}")
    if path := config.getoption("--figures"):
        table = {name: {"against": against, "error": error} for name, (against, error) in sorted(worst.items())}
        pathlib.Path(path).write_text(json.dumps(table, indent=1))
