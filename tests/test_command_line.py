"""Exit messages of commands, and types of flags."""

import argparse
import subprocess
import sys

import pytest
import torch

from diffusion_nft.command_line import command, device, path_or_name, positive, user_path
from diffusion_nft.rewards.combine import RewardError
from tests.launch import ROOT


def ended(error: BaseException) -> int | str | None:
    """The exit code of a command whose ``main`` raises ``error``."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        command(main)
    return caught.value.code


def test_an_error_of_the_user_is_one_line():
    assert ended(ValueError("no such thing")) == "ValueError: no such thing"
    assert ended(OSError(28, "No space left")) == "OSError: [Errno 28] No space left"
    assert "the same command continues" in str(ended(RewardError("out of order")))
    assert ended(KeyboardInterrupt()) == 130
    full = str(ended(torch.OutOfMemoryError("CUDA out of memory.\nStack:\n...")))
    assert full.startswith("CUDA out of memory.") and "\n" not in full and "batch" in full


def test_a_bug_shows_its_traceback():
    with pytest.raises(AssertionError):
        command(lambda: (_ for _ in ()).throw(AssertionError))


@pytest.mark.parametrize("status", [None, 0, 1])
def test_the_status_is_that_of_main(status):
    with pytest.raises(SystemExit) as caught:
        command(lambda: status)
    assert caught.value.code == status


ENDLESS = """
from diffusion_nft.command_line import command

def main():
    while True:
        print("a line")

command(main)
"""


def test_a_closed_output_pipe_is_not_an_error():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_types_of_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~/x")) == "/home/me/x"
    assert path_or_name("~/x") == "/home/me/x" and path_or_name("owner/name") == "owner/name"
    assert positive("3") == 3 and device("cpu") == torch.device("cpu")
    for kind, text in (
        (user_path, ""),
        (user_path, "a\0b"),
        (path_or_name, " "),
        (positive, "0"),
        (device, "gpu"),
        (device, "hpu:9"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            kind(text)
        assert "\n" not in str(caught.value)
