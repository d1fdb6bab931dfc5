"""The project's scripts, called in this process: it saves the seconds that importing takes."""

import importlib.util
import sys
from types import ModuleType

from tests.launch import ROOT, one_thread


def script(name: str) -> ModuleType:
    """The module ``scripts/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, *flags: object) -> int | None:
    """``main()`` of a script with these flags; what it returns."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, flags)]
    try:
        with one_thread():
            return module.main()
    finally:
        sys.argv = before
