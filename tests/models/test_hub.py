"""Models and LoRAs of the hub, and what happens while it does not answer."""

import pytest

from diffusion_nft.models import hub
from diffusion_nft.models.lora import Lora

DOWNLOADS = {
    hub.fetch_pipeline: (hub.DiffusionPipeline, "download"),
    hub.fetch_lora: (hub, "snapshot_download"),
}


class ConnectTimeout(Exception):
    """Of no family that the hub's client promises."""


@pytest.mark.parametrize("fetch", DOWNLOADS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_hub_that_does_not_answer(fetch, cached, monkeypatch, tmp_path, capsys):
    asked = []

    def download(name, local_files_only=False, **options):
        asked.append((name, local_files_only))
        if local_files_only and cached:
            return str(tmp_path)
        raise ConnectTimeout

    monkeypatch.setattr(*DOWNLOADS[fetch], download)
    if cached:
        assert fetch("owner/name") == tmp_path
        assert "'owner/name' is taken from the cache: the hub gave ConnectTimeout" in (
            capsys.readouterr().err
        )
    else:
        with pytest.raises(OSError, match=r"owner/name.*\(ConnectTimeout\).*HF_HUB_OFFLINE"):
            fetch("owner/name")
    assert asked == [("owner/name", False), ("owner/name", True)]


@pytest.mark.parametrize("fetch", DOWNLOADS)
def test_a_hub_that_answers_is_asked_once(fetch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(*DOWNLOADS[fetch], lambda name, **options: str(tmp_path))
    assert fetch("owner/name") == tmp_path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("named", "used", "note"),
    [
        ("owner/base", "owner/base", ""),
        ("owner/base", "/models/base", ""),
        ("/home/me/base", "owner/base", ""),
        ("owner/base", "/cache/models--owner--base/snapshots/0a1b", ""),
        ("", "owner/base", ""),
        ("owner/base", "owner/other", "the LoRA names owner/base as its base model; it is used on "
         "owner/other"),
        ("/home/me/base", "shapes", "the LoRA names base as its base model; it is used on shapes"),
    ],
)  # fmt: skip
def test_a_lora_of_another_base_is_noted_and_copies_are_the_same_base(named, used, note):
    assert hub.base_note(Lora({}, named), used) == note
