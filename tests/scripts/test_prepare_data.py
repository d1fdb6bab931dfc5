"""The script that downloads prompt sets, with a local server."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from diffusion_nft.data import prompts as data
from diffusion_nft.data.prompts import PUBLISHED_FILES, PublishedFile, load_prompts
from tests.launch import ROOT
from tests.local_server import Page, serving
from tests.scripts.in_process import script

CUPS = {
    "tag": "counting",
    "include": [{"class": "cup", "count": 3}],
    "exclude": [{"class": "cup", "count": 4}],
    "prompt": "a photo of three cups",
}
BENCH = {
    "tag": "two_object",
    "include": [{"class": "cup", "count": 1}, {"class": "bench", "count": 1}],
    "prompt": "a photo of a cup and a bench",
}
CONTENT = {
    ("geneval", "train_metadata.jsonl"): f"{json.dumps(BENCH)}\n".encode(),
    ("geneval", "test_metadata.jsonl"): f"{json.dumps(CUPS)}\n{json.dumps(CUPS)}\n".encode(),
    ("ocr", "train.txt"): b'a sign that says "no"\n',
    ("ocr", "test.txt"): b'a sign that says "yes"\na sign that says "perhaps"\n',
    ("pickscore", "train.txt"): b"a cat\n",
    ("pickscore", "test.txt"): b"a dog\n",
    ("drawbench", "test.txt"): b"a cat\n" * 5,
}


@pytest.fixture
def server(monkeypatch):
    """Serves small files under the published names, with their blob ids."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, files in PUBLISHED_FILES.items():
        stand_ins = []
        for file in files:
            content = CONTENT[name, file.name]
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            stand_ins.append(PublishedFile(file.split, file.name, blob))
        monkeypatch.setitem(PUBLISHED_FILES, name, tuple(stand_ins))
    with serving() as server:
        for (name, file), content in CONTENT.items():
            server.pages[f"/mirror/{name}/{file}"] = Page(content)
        monkeypatch.setenv("DIFFUSION_NFT_DATA_URL", f"{server.url}/mirror/")
        yield server


@pytest.fixture
def prepare(tmp_path, capsys, monkeypatch):
    """Runs the script for ``tmp_path/dataset``; returns (status, output, errors)."""
    module = script("prepare_data")

    def run(*flags: str) -> tuple[int, list[str], list[str]]:
        argv = ["prepare_data.py", *flags, "--output_dir", str(tmp_path / "dataset")]
        monkeypatch.setattr(sys, "argv", argv)
        status = module.main()
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_table_holds_what_the_readme_promises():
    commit = data.PUBLISHED_COMMIT
    published = f"https://github.com/NVlabs/DiffusionNFT/raw/{commit}/dataset"
    assert published == data.PUBLISHED_URL
    readme = (ROOT / "dataset/README.md").read_text(encoding="utf-8")
    assert f"commit\n`{commit}`" in readme and len(commit) == 40
    for name, files in PUBLISHED_FILES.items():
        for file in files:
            row = next(line for line in readme.splitlines() if f"`{name}/{file.name}`" in line)
            assert file.git_blob in row and len(file.git_blob) == 40


def test_all_is_fetched_checked_and_laid_out_as_published(server, prepare, tmp_path):
    status, output, errors = prepare("all")
    assert (status, errors) == (0, [])
    for (name, file), content in CONTENT.items():
        path = tmp_path / "dataset" / name / file
        assert path.read_bytes() == content
        (said,) = [line for line in output if f"{path} " in line]
        assert said.startswith(f"{name}: {path} downloaded, {len(content)} bytes ")
        assert said.endswith(f"(as published); {len(content.splitlines())} prompts")
    assert load_prompts(tmp_path / "dataset/geneval", "train")[0].metadata == BENCH

    requests = len(server.requests)
    status, output, errors = prepare("geneval", "drawbench")
    assert (status, errors) == (0, [])
    assert len(output) == 3 and all(" already there, " in line for line in output)
    assert len(server.requests) == requests


@pytest.mark.parametrize("file", ["train.txt", "train_metadata.jsonl"])
def test_files_of_the_user_are_kept(server, prepare, tmp_path, file):
    mine = write(tmp_path / "dataset/ocr" / file, b'{"prompt": "mine"}\n' * 3)
    status, output, errors = prepare("ocr")
    assert (status, errors) == (0, [])
    assert f"ocr: {mine} is yours, kept; 3 prompts" in output
    assert server.fetched() == ["/mirror/ocr/test.txt"]
    assert mine.read_bytes() == b'{"prompt": "mine"}\n' * 3


@pytest.mark.parametrize(
    ("name", "file", "line", "wrong"),
    [
        (
            "geneval",
            "train_metadata.jsonl",
            json.dumps(BENCH | {"tag": "size"}).encode(),
            "invalid GenEval metadata: tag 'size' is unknown",
        ),
        ("geneval", "train.txt", b"a cup", "invalid GenEval metadata: tag None is unknown"),
        ("ocr", "test.txt", b"caf\xe9", "not UTF-8 (byte 4)"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(
    server, prepare, tmp_path, name, file, line, wrong
):
    good = b"a sign" if name == "ocr" else json.dumps(BENCH).encode()
    if file == "train.txt":
        good = line
    path = write(tmp_path / "dataset" / name / file, b"\n".join((good, line)))
    status, output, (error,) = prepare(name)
    number = 1 if good == line else 2
    assert status == 1 and error.startswith(f"{name}: error: {path}, line {number}: {wrong}")
    assert len(output) == 1  # the other split is there


def test_a_damaged_file_is_not_put_in_place(server, prepare, tmp_path):
    server.pages["/mirror/ocr/train.txt"] = Page(b"another file")
    server.pages["/mirror/drawbench/test.txt"] = Page(b"a cat\n" * 4)
    status, output, errors = prepare("ocr", "drawbench")
    assert status == 1
    assert [line.split(" could not be fetched from ")[0] for line in errors] == [
        "ocr: error: train.txt",
        "drawbench: error: test.txt",
    ]
    assert all("git blob id" in error for error in errors)
    assert len(output) == 1 and (tmp_path / "dataset/ocr/test.txt").is_file()
    assert not (tmp_path / "dataset/ocr/train.txt").exists()
    assert not (tmp_path / "dataset/drawbench/test.txt").exists()


def test_offline_the_error_names_file_url_path_and_alternative(prepare, tmp_path, monkeypatch):
    with serving() as gone:
        url = gone.url
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DIFFUSION_NFT_DATA_URL", url)
    status, output, (test, train) = prepare("geneval")
    assert (status, output) == (1, [])
    folder = tmp_path / "dataset"
    for error, name in ((test, "test_metadata.jsonl"), (train, "train_metadata.jsonl")):
        start = f"geneval: error: {name} could not be fetched from {url}/geneval/{name} to "
        assert error.startswith(f"{start}{folder}/geneval/{name}: ")
        assert "refused" in error
    command = f"`python scripts/prepare_data.py geneval --generate --output_dir {folder}`"
    assert command in train and "--generate" not in test
    # The suggested command works.
    flags = command.strip("`").split()[2:4]
    assert prepare(*flags, "--num_prompts", "900")[0] == 1  # the test prompts are still missing
    assert len(load_prompts(folder / "geneval", "train")) == 900


def test_generated_prompts_keep_apart_from_the_test_prompts(server, prepare, tmp_path):
    generate = ("geneval", "--generate", "--num_prompts", "3000", "--seed", "5")
    status, (test, train), errors = prepare(*generate)
    path = tmp_path / "dataset/geneval/train_metadata.jsonl"
    assert (status, errors) == (0, [])
    assert "test_metadata.jsonl downloaded" in test
    assert train == (
        f"geneval: {path} written, 3,000 prompts of seed 5, apart from the 2 test prompts"
    )
    assert server.fetched() == ["/mirror/geneval/test_metadata.jsonl"]
    # 882 lines of counting have all 240 prompts except that of the test.
    counting = {p.text for p in load_prompts(path.parent, "train") if p.metadata.get("exclude")}
    assert len(counting) == 239 and CUPS["prompt"] not in counting

    content = path.read_bytes()
    status, (_, train), errors = prepare(*generate)
    assert (status, errors) == (0, []) and " already there, 3,000 prompts" in train
    status, _, (error,) = prepare(*generate[:-1], "6")
    assert status == 1
    assert error == f"geneval: error: {path} is there and kept: delete it to generate another"
    assert path.read_bytes() == content
    status, (_, train), _ = prepare("geneval")
    assert status == 0 and train == f"geneval: {path} is yours, kept; 3,000 prompts"


def test_without_test_prompts_the_output_says_that_nothing_was_kept_apart(
    server, prepare, tmp_path
):
    del server.pages["/mirror/geneval/test_metadata.jsonl"]
    generate = ("geneval", "--generate", "--num_prompts", "900")
    status, (said,), (error,) = prepare(*generate)
    assert status == 1 and "test_metadata.jsonl could not be fetched" in error
    assert "written, 900 prompts of seed 0, NOT kept apart from the test prompts" in said
    assert load_prompts(tmp_path / "dataset/geneval", "train")[0].metadata["tag"]


def test_nothing_is_generated_with_malformed_test_prompts(server, prepare, tmp_path):
    path = write(tmp_path / "dataset/geneval/test_metadata.jsonl", b"{}\n")
    status, output, errors = prepare("geneval", "--generate")
    assert (status, output) == (1, [])
    assert [error.partition(": no ")[0] for error in errors] == [
        f"geneval: error: {path}, line 1"
    ] * 2
    assert not (tmp_path / "dataset/geneval/train_metadata.jsonl").exists()


def test_the_list_fetches_nothing(server, prepare, tmp_path):
    write(tmp_path / "dataset/ocr/train.txt", b"mine\n")
    assert prepare("drawbench")[0] == 0
    requests = len(server.requests)
    status, (head, *rows), _ = prepare("--list")
    assert status == 0 and head.split() == ["set", "file", "present"]
    present = {tuple(row.split()[:2]): " ".join(row.split()[2:]) for row in rows}
    root = tmp_path / "dataset"
    assert present.pop(("ocr", f"{root}/ocr/train.txt")) == "yours"
    assert present.pop(("drawbench", f"{root}/drawbench/test.txt")) == "as published"
    assert len(present) == 5 and set(present.values()) == {"no"}
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "no name given; choose from all, geneval, ocr"),
        (["ocr", "coco"], "unknown name 'coco'; choose from all"),
        (["ocr", "--generate"], "--generate is for geneval only"),
        (["geneval", "--seed", "1"], "need --generate"),
        (["geneval", "--num_prompts", "5"], "need --generate"),
        (["geneval", "--generate", "--num_prompts", "0"], "must be at least 1, not 0"),
    ],
)
def test_the_command_line_is_checked_first(server, prepare, capsys, flags, complaint):
    with pytest.raises(SystemExit) as caught:
        prepare(*flags)
    assert caught.value.code == 2 and complaint in capsys.readouterr().err
    assert server.requests == []
