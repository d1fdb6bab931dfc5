"""Shared by the scripts: types of flags, and exit messages."""

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
    """A parser whose help shows a script's docstring ``doc`` with its line breaks."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def path_or_name(text: str) -> str:
    """argparse type of a path or a name, as of a model; expands ``~``."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from error


def user_path(text: str) -> Path:
    """argparse type of a path; expands ``~``."""
    return Path(path_or_name(text))


def natural(text: str) -> int:
    """argparse type of an integer >= 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def positive(text: str) -> int:
    """argparse type of an integer >= 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def resolution(text: str) -> int | tuple[int, int]:
    """argparse type of N, or HEIGHTxWIDTH, in pixels."""
    sides = tuple(positive(side) for side in text.split("x", 1))
    return sides if len(sides) == 2 else sides[0]


def device(text: str) -> torch.device:
    """argparse type of a usable device."""
    try:
        return usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its status.

    Errors that the user can fix, and failures after which the same command continues, exit with one
    line on stderr.
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe (``| head``).  Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as for SIGPIPE
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
