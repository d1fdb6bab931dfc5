"""The suite keeps its promise: at least 200 cases with 40 different messages, at every moment."""

import importlib
from pathlib import Path

from tests.reliability import test_bad_config
from tests.reliability.bad_inputs import MOMENTS, Case

NAMES = {path.stem for path in Path(__file__).parent.glob("test_bad_*.py")} - {Path(__file__).stem}
MODULES = [importlib.import_module(f"tests.reliability.{name}") for name in sorted(NAMES)]


def every_case() -> list[Case]:
    """The cases of all tests, as their parametrization holds them."""
    found = list(test_bad_config.GENERATED)  # a test for each key goes through these
    for module in MODULES:
        for name, test in vars(module).items():
            if name.startswith("test_"):
                for mark in vars(test).get("pytestmark", ()):
                    found += [case for case in mark.args[1] if isinstance(case, Case)]
    return found


def test_the_suite_has_the_cases_and_messages_that_it_promises():
    cases = every_case()
    assert len(cases) >= 200
    # Each of these words is asserted by the test of its case.
    assert len({case.words for case in cases if case.words}) >= 40
    assert {case.moment for case in cases} == set(MOMENTS)
