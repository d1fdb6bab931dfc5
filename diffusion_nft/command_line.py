"""What the scripts share: types of flags, and how a command ends."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from diffusion_nft.rewards.combine import RewardError, UnscoredError
from diffusion_nft.utils.devices import usable_device
from diffusion_nft.utils.paths import expand


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows ``doc``, a script's docstring, with its line breaks."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def path_or_name(text: str) -> str:
    """argparse's type of a path that may also be a name, as of a model: ``~`` is expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from error


def user_path(text: str) -> Path:
    """argparse's type of a path: ``~`` is expanded."""
    return Path(path_or_name(text))


def natural(text: str) -> int:
    """argparse's type of a count that may be 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def positive(text: str) -> int:
    """argparse's type of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def device(text: str) -> torch.device:
    """argparse's type of a device, which must be usable."""
    try:
        return usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its status; an error that the user can fix, or a
    failure after which the same command continues, is one line on stderr.
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough (``| head``).  Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a program that SIGPIPE ends
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except UnscoredError as error:
        sys.exit(f"{error}; --max_unscored N leaves up to N images out and counts them")
    except RewardError as error:
        sys.exit(f"{error}; once the cause is fixed, the same command continues from here")
    except torch.OutOfMemoryError as error:
        cause = str(error).splitlines()[0]
        sys.exit(f"{cause}  A smaller batch or resolution, or half precision, needs less memory.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)
