"""Scripts called in this process, to save the time of imports."""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from diffusion_nft.validation.config_files import load_file
from tests.launch import ROOT, one_thread


def script(name: str) -> ModuleType:
    """The module ``scripts/<name>.py``."""
    return load_file(ROOT / "scripts" / f"{name}.py")


def call(module: ModuleType, *flags: object) -> int | None:
    """Calls ``main()`` of a script with these flags and returns its result."""
    with one_thread(), flags_of(module.__name__, *flags):
        return module.main()


def command(name: str, *flags: object) -> None:
    """Runs ``scripts/<name>.py`` as from a shell; raises SystemExit."""
    with one_thread(), flags_of(name, *flags):
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


@contextmanager
def flags_of(name: str, *flags: object) -> Iterator[None]:
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
    try:
        yield
    finally:
        sys.argv = before
