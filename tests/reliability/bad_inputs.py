"""Bad inputs as cases: what is given, the words of its error, and how far the program had come."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from absl import flags
from ml_collections import ConfigDict

from diffusion_nft.distributed.ranks import Distributed
from tests.scripts.in_process import script

CPU = torch.device("cpu")
# How far a program may have come when it refuses an input: moment -> what it has noted.
MOMENTS = {
    "flags": [],  # the command line is being read
    "validation": [],  # the configuration is being checked; nothing else has begun
    "start": ["start"],  # prompts, checkpoints and LoRA files are read; no reward is built yet
    "reward": ["start", "reward"],  # a reward is being built; no model is loaded
}


@dataclass(frozen=True)
class Case:
    """``name`` of the input, the ``moment`` of its refusal, and ``words`` of the error."""

    name: str
    moment: str
    words: str
    given: Any = None


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """A test for each of ``cases``."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases of one name"
    return pytest.mark.parametrize("case", cases, ids=[ascii(name)[1:60] for name in names])


class Reached(BaseException):
    """The program came to where no bad input may lead it."""


@dataclass
class Watch:
    """What a program has reached."""

    moments: list[str]

    def expect(self, moment: str) -> None:
        """Asserts that it came as far as ``moment`` and no farther."""
        assert list(dict.fromkeys(self.moments)) == MOMENTS[moment]


def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Notes when rewards begin to be built; the base model must never be."""
    from diffusion_nft.rewards import combine

    seen = Watch([])
    real = combine.build_reward

    def build_reward(*arguments, **options):
        seen.moments.append("reward")
        return real(*arguments, **options)

    def build_model(*arguments, **options):
        raise Reached("the base model was about to be loaded")

    monkeypatch.setattr(combine, "build_reward", build_reward)
    monkeypatch.setattr("diffusion_nft.models.loading.build_model", build_model)
    return seen


@cache
def training_script() -> ModuleType:
    """scripts/train_nft.py, which can define its flags only once in a process."""
    return script("train_nft")


def train(config: ConfigDict, seen: Watch, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which the training command ends for ``config``."""
    module = training_script()

    class Joined:
        """In place of the process group: one process, and validation is over."""

        def __init__(self, timeout_minutes: float):
            seen.moments.append("start")

        def __enter__(self) -> Distributed:
            return Distributed(0, 1, 0, CPU)

        def __exit__(self, *details: object) -> None:
            pass

    monkeypatch.setattr(module, "CONFIG", SimpleNamespace(value=config))
    monkeypatch.setattr(module, "distributed", Joined)
    return exit_message(lambda: module.main(["train"]))


def parse(*overrides: str) -> str:
    """The message with which the training command refuses these flags."""
    module = training_script()
    config = f"{Path(__file__).parents[2]}/config/nft.py:shapes_smoke"
    before, sys.argv = sys.argv, ["train", f"--config={config}", *overrides]
    try:
        return exit_message(lambda: module.parse_flags(sys.argv))
    finally:
        sys.argv = before
        flags.FLAGS.unparse_flags()
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)


def exit_message(run: Callable[[], object]) -> str:
    """What a command that gives up says; not a traceback."""
    with pytest.raises(SystemExit) as caught:
        run()
    message = caught.value.code
    assert isinstance(message, str) and message and "Traceback" not in message
    return message


class Marking:
    """Unpickled, it would write the file ``marker``: code of a stranger."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "run"))


def pickles(marker: Path) -> dict[str, bytes]:
    """Files that run code if anything unpickles them, in every wrapping that torch reads."""
    import io
    import tarfile
    import zipfile

    wrapped = {"state_dict": {"weight": Marking(marker)}}
    files = {f"protocol {n}": pickle.dumps(wrapped, protocol=n) for n in (0, 2, 4, 5)}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(wrapped, buffer, _use_new_zipfile_serialization=new)
        files[name] = buffer.getvalue()
    # A tensor first, so that what follows is read with trust.
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "meta": Marking(marker)}, buffer)
    files["hidden"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(member)
            info.size = len(files["protocol 2"])
            tar.addfile(info, io.BytesIO(files["protocol 2"]))
    files["tar"] = buffer.getvalue()
    # A TorchScript archive, which torch.load would hand to another loader.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/constants.pkl", files["protocol 2"])
        archive.writestr("m/data.pkl", files["protocol 2"])
        archive.writestr("m/version", "3")
    files["script"] = buffer.getvalue()
    return files
