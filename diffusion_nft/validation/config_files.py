"""Loading of configuration files by path, as config/ is not a package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_file(path: Path | str) -> ModuleType:
    """The Python file as a module, which is not added to ``sys.modules``.

    Raises ValueError for another kind of file, FileNotFoundError, and errors of the file itself.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
