"""Which file may import which, and where a convention has its only home, read from the source."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion_nft"
FILES = sorted(PACKAGE.rglob("*.py"))

# The package from the bottom up: folders, and the files next to them.  Imports go down.
WINGS = (
    "flow",
    "randomness",
    "advantages",
    "utils",
    "distributed",
    "shapes",
    "images",
    "data",
    "solvers",
    "algorithms",
    "rewards",
    "command_line",
    "models",
    "policy",
    "rollout",
    "batches",
    "update",
    "validation",
    "runs",
    "evaluation",
    "tracking",
    "trainer",
    "build",
    "run",
    "experiments",
    "benchmarks",
    "reports",
)
FLOORS = {f"diffusion_nft.{wing}": floor for floor, wing in enumerate(WINGS)}
# What is below a room and yet not its business.
FORBIDDEN = {
    "diffusion_nft.flow": ("diffusers",),
    "diffusion_nft.advantages": ("torch.distributed", "diffusion_nft"),
    "diffusion_nft.algorithms": (
        "torch.distributed",
        "diffusers",
        "peft",
        "diffusion_nft.distributed",
    ),
    "diffusion_nft.models": ("diffusion_nft.algorithms",),
    "diffusion_nft.rollout": ("diffusion_nft.algorithms",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int | None:
    rooms = [room for room in FLOORS if is_within(module, room)]
    return FLOORS[max(rooms, key=len)] if rooms else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    name = module_name(path)
    own = floor(name)
    assert own is not None or name == "diffusion_nft", f"{name} has no floor: add it to FLOORS"
    for target in imports(path):
        level = floor(target)
        assert level is None or own is None or level <= own, f"{name} imports {target}"
        assert not is_within(target, "scripts") and not is_within(target, "tests")
    for room, strangers in FORBIDDEN.items():
        if is_within(name, room):
            for target in imports(path):
                for stranger in strangers:
                    known = is_within(target, room) or not is_within(target, stranger)
                    assert known, f"{name} must not know {target}"


def test_the_config_knows_neither_torch_nor_the_package():
    for path in (ROOT / "config").glob("*.py"):
        assert not {t for t in imports(path) if t.split(".")[0] in ("torch", "diffusion_nft")}


def numbers(path: Path) -> set[object]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_only_flow_knows_the_factor_between_sigma_and_timestep():
    # 1000 bytes make a kilobyte in the JPEG reward; the others are library code of scripts.
    allowed = {"rewards/jpeg.py", "benchmarks/models.py", "experiments/tables.py"}
    others = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if {1000} & {v for v in numbers(path) if type(v) in (int, float)}
    }
    assert others - allowed == {"flow.py"}


def test_only_the_homes_ask_for_ranks():
    for path in FILES:
        if module_name(path).startswith("diffusion_nft.distributed"):
            continue
        for target in imports(path):
            assert not is_within(target, "torch.distributed"), path


def test_no_file_is_longer_than_400_lines():
    for path in [*FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "config").glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_scripts_are_entry_points():
    for path in (ROOT / "scripts").glob("*.py"):
        scripts = {other.stem for other in path.parent.glob("*.py")}
        assert not scripts & imports(path), path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 135, path


def test_nothing_catches_everything_silently():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"
                if isinstance(node.type, ast.Name) and node.type.id in (
                    "Exception",
                    "BaseException",
                ):
                    raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                    assert raises, f"{path}:{node.lineno} swallows {node.type.id}"


def test_registries_name_what_exists():
    from diffusion_nft.algorithms import ALGORITHMS
    from diffusion_nft.models import MODELS
    from diffusion_nft.rewards import REWARDS

    for entry in (*ALGORITHMS.values(), *MODELS.values(), *REWARDS.values()):
        module, _, cls = entry.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        if not path.exists():
            path = ROOT / module.replace(".", "/") / "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assert cls in names or any(target.endswith(f".{cls}") for target in imports(path)), entry
