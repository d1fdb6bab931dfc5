"""Prompt sets, and the prompts of an epoch.

A prompt set is a folder with one file per split, either ``SPLIT.txt`` (one prompt per line) or
``SPLIT_metadata.jsonl`` (one JSON object per line, in the GenEval format: "prompt", perhaps
"negative_prompt", and keys for rewards).  See dataset/README.md.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch

from diffusion_nft.randomness import generator
from diffusion_nft.utils.files import sha256
from diffusion_nft.utils.paths import expand

T = TypeVar("T")
# Dataset -> split -> SHA-256 of its file.
PromptHashes = Mapping[str, Mapping[str, str]]

DATASET_ROOT = Path(__file__).resolve().parents[2] / "dataset"
SPLITS = ("train", "test")
SOURCE = "github.com/NVlabs/DiffusionNFT (folder dataset/)"


@dataclass(frozen=True)
class PublishedFile:
    """A file of a published prompt set; ``git_blob``: its git blob id."""

    split: str
    name: str
    git_blob: str


# The published prompt sets, downloaded by scripts/prepare_data.py from this commit.
PUBLISHED_COMMIT = "24af5554898d85e93efa492f42b5e9cdf4156e9b"
PUBLISHED_URL = f"https://github.com/NVlabs/DiffusionNFT/raw/{PUBLISHED_COMMIT}/dataset"
PUBLISHED_FILES: dict[str, tuple[PublishedFile, ...]] = {
    "geneval": (
        PublishedFile("train", "train_metadata.jsonl", "0b97e8a6802c08fc7537cd00c76ae79c851bddcb"),
        PublishedFile("test", "test_metadata.jsonl", "27cdaf5cc1356fe15aeadbb8df55682ca74228f0"),
    ),
    "ocr": (
        PublishedFile("train", "train.txt", "3ce0521b77b0a9031191d66ecc36ebaaf27a3922"),
        PublishedFile("test", "test.txt", "8deb4f8d8f2e863f45353354243669b3c991a6a2"),
    ),
    "pickscore": (
        PublishedFile("train", "train.txt", "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b"),
        PublishedFile("test", "test.txt", "45f05231b969fb5f74c8debd606b22cd3be27f8e"),
    ),
    "drawbench": (PublishedFile("test", "test.txt", "8d96e7cf7017ce6ce299a6eec96e21467a2ac7aa"),),
}


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt set; ``metadata``: its JSON object, empty for text files.  ``negative``:
    its "negative_prompt", for classifier-free guidance; None: that of the configuration.
    """

    text: str
    metadata: dict = field(default_factory=dict)
    negative: str | None = None


def resolve_dataset(name_or_path: str | Path) -> Path:
    """The absolute folder of a prompt set: a name under DATASET_ROOT, or a path, which contains
    ``/`` or begins with ``.`` or ``~``.  Raises ValueError if it does not exist.
    """
    given = str(name_or_path)
    try:
        path = expand(given)
        folder = DATASET_ROOT / path if _is_name(given) else Path(path)
        if given and folder.is_dir():
            return folder.resolve()
    except OSError as error:  # such as a part that is too long
        raise ValueError(f"dataset = {given!r}: is not a path ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"dataset = {given!r}: {error}") from error
    raise ValueError(f"dataset = {given!r}: {_missing(given, folder)}")


def _is_name(given: str) -> bool:
    return Path(given).name == given and not given.startswith((".", "~"))


def _missing(given: str, folder: Path) -> str:
    present = sorted(path.name for path in DATASET_ROOT.glob("*/"))
    choices = f"choose from {', '.join(present) or 'none present'}, or the path of a folder"
    if not given:
        return f"no prompt set is chosen; {choices}"
    if given in PUBLISHED_FILES:
        files = ", ".join(file.name for file in PUBLISHED_FILES[given])
        return (
            f"{folder} does not exist; `python scripts/prepare_data.py {given}` downloads {files} "
            f"of {SOURCE}; {choices}"
        )
    hint = f" (a folder here is ./{given})" if _is_name(given) and Path(given).is_dir() else ""
    return f"{folder} is not a folder; {choices}{hint}"


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of ``split`` (train | test) in ``folder``; a valid prompt set has one."""
    assert split in SPLITS, split
    names = (f"{split}.txt", f"{split}_metadata.jsonl")
    return [folder / name for name in names if (folder / name).is_file()]


def split_file(dataset: str | Path, split: str) -> Path:
    """The file of ``split`` (train | test) in a prompt set.  Raises ValueError for none or two."""
    folder = resolve_dataset(dataset)
    found = files_of(folder, split)
    if len(found) == 1:
        return found[0]
    which = "both {} and {}" if found else "neither {} nor {}"
    which = which.format(f"{split}.txt", f"{split}_metadata.jsonl")
    hint = "" if found else _hint(folder.name, split)
    raise ValueError(
        f"dataset = {str(dataset)!r}: {folder} has {which}; the {split} split needs one of "
        f"them{hint}"
    )


def hash_splits(datasets: Iterable[str]) -> dict[str, dict[str, str]]:
    """Dataset -> split -> SHA-256 of its file.  Raises as ``split_file``, and OSError."""
    return {name: {split: sha256(split_file(name, split)) for split in SPLITS} for name in datasets}


def changed_prompts(former: PromptHashes, now: PromptHashes) -> list[tuple[str, str]]:
    """(dataset, split) of every file with different hashes in ``former`` and ``now``."""
    return [
        (dataset, split)
        for dataset in sorted(former.keys() & now.keys())
        for split, digest in now[dataset].items()
        if former[dataset][split] != digest
    ]


def _hint(name: str, split: str) -> str:
    """Advice on a missing split if ``name`` is a published prompt set, else ""."""
    if name not in PUBLISHED_FILES:
        return ""
    if split not in {file.split for file in PUBLISHED_FILES[name]}:
        return f"; {name} is published without one"
    return f"; `python scripts/prepare_data.py {name}` downloads it"


def load_prompts(dataset: str | Path, split: str) -> list[Prompt]:
    """All lines of a split, in file order, with duplicates.  Raises ValueError as
    ``split_file`` and ``read_prompts``.
    """
    return read_prompts(split_file(dataset, split))


def read_prompts(path: Path, *, skip_blank: bool = False) -> list[Prompt]:
    """All lines of a prompt file, in file order: JSON objects with a "prompt" in ``.jsonl`` files,
    prompts in others.

    Raises ValueError, with file and line number, for a malformed line, and for a blank one before
    the last prompt unless ``skip_blank``.
    """
    parse = _parse_json if path.suffix == ".jsonl" else _parse_text
    # str.splitlines would also split at U+2028, which may occur in a prompt.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path}: the file is empty; it needs one prompt per line")
    return [
        _parse_line(path, number, line, parse)
        for number, line in enumerate(lines, start=1)
        if line.strip() or not skip_blank
    ]


def draw_lines(prompts: Sequence[Prompt], number: int, together: int = 1) -> list[int]:
    """Indices of up to ``number`` of ``prompts``, ascending, the same at every call.

    They are drawn at random, because files tend to be sorted, and equally from each tag.
    ``together``: number of lines of a prompt to draw together if possible, for statistics between
    images of a prompt.
    """
    if number >= len(prompts):
        return list(range(len(prompts)))
    by_tag: dict[str, list[list[int]]] = {}
    unfilled: dict[str, list[int]] = {}
    for line, prompt in enumerate(prompts):
        unit = unfilled.setdefault(prompt.text, [])
        if not unit:
            by_tag.setdefault(str(prompt.metadata.get("tag", "")), []).append(unit)
        unit.append(line)
        if len(unit) == together:
            del unfilled[prompt.text]
    waiting = {
        tag: [units[i] for i in torch.randperm(len(units), generator=generator("lines", tag))]
        for tag, units in by_tag.items()
    }
    drawn: dict[str, list[int]] = {tag: [] for tag in by_tag}
    while sum(map(len, drawn.values())) < number:
        tag = min(filter(waiting.get, waiting), key=lambda tag: len(drawn[tag]))
        drawn[tag] += waiting[tag].pop()
    return sorted(list(chain.from_iterable(drawn.values()))[:number])


def evaluated_lines(dataset: str | Path, number: int) -> tuple[list[Prompt], list[int]]:
    """``number`` lines of a test set (0: all), and their indices.

    Lines of a prompt are drawn in pairs, because ``eval/diversity`` needs two.  Raises as
    ``load_prompts``.
    """
    prompts = load_prompts(dataset, "test")
    lines = draw_lines(prompts, number or len(prompts), together=2)
    return [prompts[line] for line in lines], lines


def _parse_line(path: Path, number: int, line: bytes, parse: Callable[[str], Prompt]) -> Prompt:
    try:
        text = line.decode("utf-8").strip()
        if not text:
            raise ValueError("the line is empty")
        return parse(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def check_text(text: str) -> None:
    """Raises ValueError for a NUL, as in other encodings and damaged files, and for half a
    surrogate pair, as in broken JSON escapes, which tokenizers do not accept.
    """
    if "\0" in text:
        raise ValueError(f"a NUL (character {text.index(chr(0)) + 1}): this is not UTF-8 text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair (character {error.start + 1}), which is not a character"
        ) from error


def _parse_text(line: str) -> Prompt:
    check_text(line)
    return Prompt(line)


def _parse_json(line: str) -> Prompt:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"must be a JSON object, not {type(metadata).__name__}")
    if "prompt" not in metadata:
        raise ValueError(f'no "prompt"; the keys are {", ".join(metadata) or "none"}')
    text = metadata["prompt"]
    if not isinstance(text, str):
        raise ValueError(f'"prompt" must be a string, not {type(text).__name__}')
    if not text.strip():
        raise ValueError('"prompt" is empty')
    check_text(text)
    negative = metadata.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f'"negative_prompt" must be a string, not {type(negative).__name__}')
    check_text(negative or "")
    try:
        # As required by reward servers and result files.
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a surrogate pair, which is not a character") from error
    except ValueError as error:
        raise ValueError("NaN and Infinity are not valid JSON numbers") from error
    return Prompt(text.strip(), metadata, negative)


def epoch_prompts(prompts: Sequence[T], num_groups: int, *, seed: int, epoch: int) -> list[T]:
    """The prompts of ``epoch``: the first ``num_groups`` of a random permutation of ``prompts``.

    If there are fewer than ``num_groups``, further permutations follow.  Duplicate lines of a
    prompt set count as different prompts.
    """
    assert prompts, "a loaded prompt set is never empty"
    indices: list[int] = []
    cycle = 0
    while len(indices) < num_groups:
        order = torch.randperm(len(prompts), generator=generator(seed, epoch, cycle, "prompts"))
        indices += order.tolist()
        cycle += 1
    return [prompts[i] for i in indices[:num_groups]]


def shard(num_items: int, rank: int, world_size: int) -> range:
    """The contiguous share of ``rank``, possibly empty; sizes differ by at most one."""
    assert 0 <= rank < world_size, (rank, world_size)
    return range(rank * num_items // world_size, (rank + 1) * num_items // world_size)
