"""The project's scripts, called in this process: it saves the seconds that importing takes."""

import sys
from types import ModuleType

from diffusion_nft.validation.config_files import load_file
from tests.launch import ROOT, one_thread


def script(name: str) -> ModuleType:
    """The module ``scripts/<name>.py``."""
    return load_file(ROOT / "scripts" / f"{name}.py")


def call(module: ModuleType, *flags: object) -> int | None:
    """``main()`` of a script with these flags; what it returns."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, flags)]
    try:
        with one_thread():
            return module.main()
    finally:
        sys.argv = before
