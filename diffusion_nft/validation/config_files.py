"""Configuration files are found by path: ``config`` is no package.

They do the same for one another in lines of their own, since they know nothing of this one.
"""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_file(path: Path | str) -> ModuleType:
    """The Python file as a module of its own, not in ``sys.modules``.

    Raises ValueError for another kind of file, FileNotFoundError, and what the file itself raises.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
