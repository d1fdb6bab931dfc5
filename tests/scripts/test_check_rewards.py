"""The command that checks each reward and prints the fix of a failure."""

import sys

import pytest

from diffusion_nft.rewards import REWARDS, RewardOutput
from diffusion_nft.rewards.weights import ROOT_VARIABLE
from tests.launch import ROOT
from tests.scripts.in_process import call, script


class Breaks:
    """Loads, and fails on the second call."""

    calls = 0

    def __init__(self, device):
        del device

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of luck")
        return RewardOutput(images.mean((1, 2, 3)))


class Broken:
    """An installation that fails unexpectedly."""

    def __init__(self, device):
        raise RuntimeError("operator torchvision::nms does not exist")


def check(capsys, *flags: str) -> tuple[int, dict[str, list[str]], str]:
    """Exit code, cells of the table by reward, and all that follows the table."""
    code = call(script("check_rewards"), *flags, "--device", "cpu")
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    return code, rows, rest


def test_rewards_that_run_anywhere_pass(capsys):
    code, rows, rest = check(capsys, "--reward", "shapes,jpeg_compressibility")
    assert code == 0 and not rest
    assert rows.keys() == {"shapes", "jpeg_compressibility"}
    for cells in rows.values():
        assert cells[:4] == ["yes"] * 4
    # Two correct images of the shapes world.
    assert rows["shapes"][-2:] == ["1.000", "1.000"]


def test_missing_weights_are_named_with_the_command_that_fetches_them(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    code, rows, rest = check(capsys, "--reward", "shapes,aesthetic")
    assert code == 1
    assert rows["aesthetic"] == ["yes", "NO"] and rows["shapes"][:4] == ["yes"] * 4
    assert "linearMSE.pth" in rest and rest.endswith("    python scripts/download.py aesthetic\n")


def test_a_missing_package_is_named_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    code, rows, rest = check(capsys, "--reward", "ocr")
    assert (code, rows["ocr"]) == (1, ["NO"])
    assert rest.endswith('    pip install -e ".[ocr]"\n')


@pytest.mark.parametrize(
    ("cls", "cells", "words"),
    [
        (Breaks, ["yes", "yes", "yes", "NO"], "out of luck"),
        (Broken, ["yes", "yes", "NO"], "torchvision::nms"),
    ],
)
def test_other_failures_are_shown_and_end_nothing(capsys, monkeypatch, cls, cells, words):
    monkeypatch.setitem(REWARDS, "other", f"{__name__}:{cls.__name__}")
    code, rows, rest = check(capsys, "--reward", "other,jpeg_compressibility")
    assert code == 1 and words in rest
    assert rows["other"][: len(cells)] == cells
    assert rows["jpeg_compressibility"][:4] == ["yes"] * 4


def test_a_preset_names_the_rewards_of_all_its_stages(monkeypatch, capsys):
    checks = script("check_rewards")
    monkeypatch.setattr(checks, "check", lambda name, *args: checks.Finding(name, passed=4))
    config = f"{ROOT}/config/nft.py:sd3_multi_reward_paper"
    call(checks, "--config", config, "--device", "cpu")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert {"geneval", "ocr", "pickscore", "clipscore", "hpsv2"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.filterwarnings("ignore:reward ")
def test_a_served_reward_that_is_down_names_its_server(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    preset = tmp_path / "mine.py"
    preset.write_text(
        f"import runpy\npresets = runpy.run_path({str(ROOT / 'config/nft.py')!r})\n"
        "def get_config(name):\n"
        "    config = presets['get_config'](name)\n"
        "    with config.reward_servers.unlocked():\n"
        "        config.reward_servers.shapes = ('http://127.0.0.1:9',)\n"
        "    return config\n"
    )
    code, _, rest = check(capsys, "--config", f"{preset}:shapes_smoke")
    assert code == 1
    assert rest.endswith("    python scripts/reward_server.py --reward shapes --port 9\n")


def test_an_unknown_reward_is_one_line():
    with pytest.raises(ValueError, match="'ocrr' is unknown; choose from geneval"):
        call(script("check_rewards"), "--reward", "ocrr")
