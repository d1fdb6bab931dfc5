"""Invalid flags of scripts are refused in one line before a model or reward is loaded."""

from pathlib import Path

import pytest

from tests.reliability.bad_inputs import Case, Reached, Watch, parametrized, watch
from tests.scripts.in_process import call, script

BUILT_IN = ("--pretrained", "shapes")
ONE = (*BUILT_IN, "--prompt", "a red circle")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    (tmp_path / "x.jsonl").write_text('{"prompt": "a red circle"}\na red circle\n')
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refused(name: str, case: Case, seen: Watch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of the error."""
    # argparse raises SystemExit.
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        call(script(name), *case.given)
    seen.expect(case.moment)
    said = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    return said.strip().splitlines()[-1]


# name -> (words, flags)
SAMPLE: dict[str, tuple[str, tuple[object, ...]]] = {
    "no prompt": ("give --prompt or --prompts_file", BUILT_IN),
    "empty prompts": ("give --prompt or --prompts_file", (*BUILT_IN, "--prompt", " \t")),
    "a prompt of NUL": ("a prompt holds a NUL", (*BUILT_IN, "--prompt", "a\0b")),
    "prompts absent": ("No such file", (*BUILT_IN, "--prompts_file", "absent")),
    "prompts of a folder": ("Is a directory", (*BUILT_IN, "--prompts_file", "full")),
    "prompts in Latin-1": ("latin, line 1: not UTF-8", (*BUILT_IN, "--prompts_file", "latin")),
    "prompts of no JSON": ("x.jsonl, line 2: not JSON", (*BUILT_IN, "--prompts_file", "x.jsonl")),
    "output to a file": ("file is not a folder", (*ONE, "--output_dir", "file")),
    "output below a file": ("file/x could not be written", (*ONE, "--output_dir", "file/x")),
    "output of NUL": ("--output_dir: 'a\\x00b' is not a path", (*ONE, "--output_dir", "a\0b")),
    "output of nobody": ("~nobody-at-all has no home", (*ONE, "--output_dir", "~nobody-at-all/x")),
    "a LoRA of no name": ("--lora_hf_path: must not be empty", (*ONE, "--lora_hf_path", "")),
    "comparison with nothing": ("--compare needs", (*ONE, "--compare")),
    "seeds of text": ("invalid int value", (*ONE, "--seeds", "one")),
    "no steps": ("must be at least 1", (*ONE, "--num_inference_steps", 0)),
    "steps of NaN": ("invalid positive value", (*ONE, "--num_inference_steps", "nan")),
    "guidance of NaN": ("in [1, inf)", (*ONE, "--guidance_scale", "nan")),
    "a huge size": ("from 16 to 65536", (*ONE, "--resolution", 10**18)),
    "another size": ("48 pixels only", (*ONE, "--resolution", "64x48")),
    "512 tokens": ("trained at 8 tokens", (*ONE, "--max_sequence_length", 512)),
    "an unknown solver": ("solver 'dmp2' is unknown", (*ONE, "--solver", "dmp2")),
    "an unknown family": ("invalid choice", (*ONE, "--model_type", "../sd3")),
    "an unknown precision": ("invalid choice", (*ONE, "--mixed_precision", "int8")),
    "a model of any folder": ("model_index.json", ("--pretrained", ".", "--prompt", "x")),
    "a model that climbs": ("hub name", ("--pretrained", "../../x", "--prompt", "x")),
    "no run there": ("is neither a checkpoint", (*ONE, "--checkpoint_path", "full")),
    "both": ("not allowed with", (*ONE, "--checkpoint_path", "x", "--lora_hf_path", "y")),
}
EXPORT: dict[str, tuple[str, tuple[object, ...]]] = {
    "nothing to export": ("is required", ("--output_dir", "new")),
    "a full folder": ("is not empty", ("--lora_hf_path", "x/y", "--output_dir", "full")),
    "a file": ("", ("--lora_hf_path", "x/y", "--output_dir", "file")),
    "a pickle": ("is a pickle, which can", ("--lora_hf_path", "pickle", "--output_dir", "new")),
    "no LoRA": ("has no LoRA", ("--lora_hf_path", "full", "--output_dir", "new")),
    "a hub name that climbs": (
        "is not a local path and could not be fetched",
        ("--lora_hf_path", "../../x", "--output_dir", "new"),
    ),
    "no run there": ("/nowhere", ("--checkpoint_path", "/nowhere", "--output_dir", "new")),
    "a push nowhere": (
        "--push takes OWNER/NAME",
        ("--lora_hf_path", "pickle", "--output_dir", "new", "--push", "name"),
    ),
    "a push that climbs": (
        "Repo id must",
        ("--lora_hf_path", "pickle", "--output_dir", "new", "--push", "a/../b"),
    ),
}
PORT = ("--port", 0)
SHAPES = ("--reward", "shapes", *PORT)
SERVER: dict[str, tuple[str, tuple[object, ...]]] = {
    "no reward": ("are required", ()),
    "an unknown reward": ("invalid choice", ("--reward", "../x", *PORT)),
    "a port of text": ("invalid", ("--reward", "shapes", "--port", "http")),
    "a port too high": ("is not from 0 to 65535", ("--reward", "shapes", "--port", 65536)),
    "an option without value": ("is not of the form KEY=VALUE", (*SHAPES, "--option", "size")),
    "an unknown option": ("shapes has no option 'size'", (*SHAPES, "--option", "size=3")),
    "a deep option": ("shapes has no option 'x'", (*SHAPES, "--option", "x=" + "[" * 9999)),
    "an unknown device": ("", (*SHAPES, "--device", "gpu")),
    "an absent device": ("'hpu:9' cannot be used", (*SHAPES, "--option", "device=hpu:9")),
    "no images": ("must be at least 1, not 0", (*SHAPES, "--max_images", 0)),
    "no megabytes": ("must be a positive number", (*SHAPES, "--max_megabytes", "nan")),
    "a host of NUL": ("", (*SHAPES, "--host", "a\0b")),
    "an open host": ("opens the server to other machines", (*SHAPES, "--host", "0.0.0.0")),
    "an unknown engine": (
        "rapidocr, paddleocr",
        ("--reward", "ocr", *PORT, "--option", "backend=x"),
    ),
    "threads below 1": (
        "the threads of ocr must be at least 1",
        ("--reward", "ocr", *PORT, "--option", "threads=-1"),
    ),
}


def cases(table: dict[str, tuple[str, tuple[object, ...]]]) -> pytest.MarkDecorator:
    return parametrized(
        [Case(name, "flags", words, given) for name, (words, given) in table.items()]
    )


@cases(SAMPLE)
def test_sample_refuses(case, here, monkeypatch, capsys):
    line = refused("sample", case, watch(monkeypatch), capsys)
    assert case.words in line and not (here / "samples").exists()


@cases(EXPORT)
def test_export_refuses(case, here, monkeypatch, capsys):
    line = refused("export_lora", case, watch(monkeypatch), capsys)
    assert case.words in line and not (here / "new").exists()
    assert (here / "full" / "x").read_text() == "x"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*arguments: object, **options: object) -> None:
        raise Reached("a reward was about to be served")

    monkeypatch.delenv("REWARD_SERVER_TOKEN", raising=False)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr("diffusion_nft.rewards.serving.server.create_app", serve)


@cases(SERVER)
def test_the_reward_server_refuses(case, server, monkeypatch, capsys):
    assert case.words in refused("reward_server", case, watch(monkeypatch), capsys)


@pytest.mark.parametrize("token", ["a b", "a\nb", "é", "\udcff", "a\x7f"])
def test_a_token_that_no_header_can_hold_is_refused_unquoted(token, server, monkeypatch):
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    with pytest.raises(ValueError, match="must be printable ASCII") as caught:
        call(script("reward_server"), *SHAPES)
    assert token not in str(caught.value)
