"""Any input is valid or refused by name, without other exceptions.

The examples are the same in each run; FUZZ_FACTOR=20 in the environment makes twenty times as many.
"""

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.models.lora import PEFT_CONFIG, PEFT_FOLDER, load_lora
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.serving.protocol import (
    PROTOCOL,
    ScoringAnswer,
    encode_images,
    read,
)
from diffusion_nft.rewards.serving.server import create_app
from diffusion_nft.runs.checkpoint import MANIFEST, STATE, CheckpointError, load_checkpoint
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.schema import SCHEMA, ConfigError, validate
from tests.reliability.bad_inputs import CPU
from tests.reliability.test_bad_config import config_with
from tests.reliability.test_bad_requests import Counting
from tests.reliability.test_bad_weights import lora, sign, trained  # noqa: F401  (fixtures)

# Fixtures are only read, or written again for each example.
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
FAST = settings(
    max_examples=6 * FACTOR,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=SHARED,
)
MANY = settings(FAST, max_examples=30 * FACTOR)

# Any text, halves of surrogate pairs included.
TEXT = st.text(st.characters(), max_size=12)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(2**63), 2**63 - 1, -0.0, 5e-324])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JSON = st.recursive(
    SCALARS,
    lambda items: st.one_of(st.lists(items, max_size=4), st.dictionaries(TEXT, items, max_size=4)),
    max_leaves=8,
)
# Close to valid, as other text would not pass the first check.
WORDS = st.sampled_from(
    ["shapes", "ocr", "nft", "all", "dpm2", "flow", "adaptive", "off", "no", "bf16", "sd3", ".",
     "..", "/", "~", "a/b", "http://host:1", "linear_to_half", "on_policy", "\0", "\n", "\ud800"]
)  # fmt: skip
VALUES = st.one_of(
    WORDS,
    JSON,
    st.binary(max_size=4),
    st.tuples(WORDS),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.sets(st.integers(), max_size=2),
    st.dictionaries(WORDS, st.one_of(NUMBERS, st.tuples(WORDS), st.dictionaries(WORDS, SCALARS))),
)


@settings(MANY, max_examples=150 * FACTOR)
@given(key=st.sampled_from(sorted(SCHEMA)), value=VALUES)
def test_any_value_of_any_key_is_valid_or_refused_by_its_name(key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = SCHEMA[key]
    complaint = check(value)
    assert complaint is None or (isinstance(complaint, str) and complaint)
    try:
        config = config_with(key, value, "run")
    except (TypeError, ValueError, AttributeError):  # refused by ConfigDict itself
        return
    try:
        validate(config)
    except ConfigError as error:
        assert any(key.removesuffix("s") in problem for problem in error.problems)
        assert all("\n" not in problem for problem in error.problems)
        assert complaint or key in COMBINED
    else:
        assert not complaint
        # A run writes it at its start.
        assert json.loads(json.dumps(flatten(config), allow_nan=False)) is not None


# Keys whose valid values may conflict with others of the smoke preset.
COMBINED = {
    "sample.num_steps",
    "sample.negative_prompt",
    "train.sigma_range",
    "train.timestep_fraction",
    "train.gradient_step_per_epoch",
    "sample.num_image_per_prompt",
    "resolution",
    "eval.resolution",
    "pretrained.model",
    "pretrained.max_sequence_length",
    "sample.solver",
    "sample.noise_level",
    "reward_fn",
    "eval.held_out_rewards",
    "dataset",
    "reward_servers",
    "reward_options",
    "stages",
}


@MANY
@given(content=st.binary(max_size=60))
def test_any_bytes_are_prompts_or_refused_with_the_file(content, tmp_path):
    for name in ("train.txt", "train_metadata.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            prompts = load_prompts(tmp_path, "train")
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            for prompt in prompts:
                assert prompt.text.strip() and "\0" not in prompt.text
                prompt.text.encode()
        path.unlink()


@MANY
@given(value=st.one_of(JSON, st.dictionaries(st.just("prompt"), JSON, min_size=1)))
def test_any_json_is_a_prompt_or_refused_with_its_line(value, tmp_path):
    path = tmp_path / "train_metadata.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps(value))
    try:
        _, prompt = load_prompts(tmp_path, "train")
    except ValueError as error:
        assert str(error).startswith(f"{path}, line 2: ")
    else:
        assert prompt.metadata == value
        # As sent to a server and written to the results.
        json.dumps(prompt.metadata, ensure_ascii=False, allow_nan=False).encode()


CLAUSES = st.dictionaries(
    st.sampled_from(["class", "count", "color", "position"]),
    st.one_of(JSON, st.sampled_from(["circle", "red", 1, ["above", 0]])),
)
CAPTIONS = st.fixed_dictionaries(
    {"tag": st.sampled_from(["counting", "colors"])},
    optional={"include": st.one_of(JSON, st.lists(CLAUSES)), "exclude": st.lists(CLAUSES)},
)


@MANY
@given(caption=CAPTIONS)
def test_any_caption_can_be_judged_or_is_refused(caption):
    from diffusion_nft.shapes.verifier import RULES, judge

    for reward in ("shapes", "geneval"):
        try:
            check_prompts([reward], ["x"], [caption])
        except ValueError as error:
            assert f"the {reward} reward cannot score line 1: " in str(error)
        else:
            score, _ = judge([], caption, RULES["standard"])
            assert 0 <= score <= 1


IMAGE = encode_images(torch.zeros(1, 3, 4, 4))[0]


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` with a few bytes replaced, or cut off."""
    change = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))

    def apply(changes: list[tuple[int, int]], end: int) -> bytes:
        values = bytearray(data)
        for place, value in changes:
            values[place] = value
        return bytes(values[:end])

    return st.builds(apply, st.lists(change, max_size=4), st.integers(1, len(data)))


IMAGES = st.one_of(
    TEXT,
    st.just(IMAGE),
    mutated(base64.b64decode(IMAGE)).map(lambda data: base64.b64encode(data).decode()),
)
REQUESTS = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "protocol": st.just(PROTOCOL),
            "reward": st.just("shapes"),
            "options": st.just({}),
            "images": st.lists(IMAGES, max_size=2),
            "prompts": st.one_of(st.lists(TEXT, max_size=2), JSON),
            "metadata": st.one_of(st.lists(st.dictionaries(TEXT, JSON), max_size=2), JSON),
        }
    ),
)


@MANY
@given(request=st.one_of(REQUESTS.map(lambda r: json.dumps(r).encode()), st.binary()))
def test_any_body_is_answered(request, app):
    reply = app.post("/score", content=request)
    assert reply.status_code in (200, 413, 422)
    assert reply.status_code == 200 or reply.json()["detail"]


@pytest.fixture(scope="module")
def app():
    built = create_app(
        "shapes", Counting(), CPU, options={}, token="", max_images=2, max_megabytes=1.0
    )
    with TestClient(built) as client:
        yield client


ANSWERS = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "scores": st.one_of(st.lists(SCALARS, min_size=2, max_size=2), JSON),
            "components": st.dictionaries(TEXT, st.lists(SCALARS, min_size=2, max_size=2)),
        }
    ),
)


@MANY
@given(answer=ANSWERS)
def test_any_answer_holds_scores_that_are_finite_or_missing_or_is_refused(answer):
    try:
        output = read(ScoringAnswer, json.dumps(answer).encode()).output(2)
    except ValueError as error:
        assert str(error)
    else:
        assert not output.scores.isinf().any() and output.scores.shape == (2,)
        assert not any(values.isinf().any() for values in output.components.values())


@pytest.fixture(scope="module")
def work(trained, tmp_path_factory) -> Path:  # noqa: F811
    """A copy of a sound checkpoint."""
    (source,) = (trained / "checkpoints").glob("checkpoint-*")
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("fuzz") / source.name))


ENTRIES = st.dictionaries(
    st.one_of(TEXT, st.sampled_from([STATE, "../x", "/etc/passwd", "current.safetensors"])),
    st.one_of(JSON, st.fixed_dictionaries({"size": JSON, "sha256": JSON})),
    max_size=3,
)
MANIFESTS = st.one_of(
    JSON,
    st.fixed_dictionaries({"files": st.one_of(JSON, ENTRIES), "tensors": st.one_of(JSON, ENTRIES)}),
)


@MANY
@given(value=st.one_of(MANIFESTS.map(lambda v: json.dumps(v).encode()), st.binary()))
def test_any_manifest_is_the_checkpoints_or_refused_with_its_folder(value, work):
    sound = (work / MANIFEST).read_bytes()
    (work / MANIFEST).write_bytes(value)
    try:
        load_checkpoint(work)
    except CheckpointError as error:
        assert str(work) in str(error)
    finally:
        (work / MANIFEST).write_bytes(sound)


@FAST
@given(value=st.one_of(JSON.map(lambda v: json.dumps(v).encode()), st.binary()))
def test_any_signed_state_is_an_object_or_refused(value, work):
    sound = (work / STATE).read_bytes(), (work / MANIFEST).read_bytes()
    (work / STATE).write_bytes(value)
    manifest = json.loads(sound[1])
    manifest["files"] = {
        STATE: {"size": len(value), "sha256": hashlib.sha256(value).hexdigest()},
    } | {k: v for k, v in manifest["files"].items() if k == "old.safetensors"}
    manifest["tensors"] = ["old"]
    (work / MANIFEST).write_text(json.dumps(manifest))
    try:
        assert isinstance(load_checkpoint(work).state, dict)
    except CheckpointError as error:
        assert str(work) in str(error)
    finally:
        (work / STATE).write_bytes(sound[0])
        (work / MANIFEST).write_bytes(sound[1])


@FAST
@given(
    changes=st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "target_modules", "peft_type", "use_dora", "bias",
                         "use_rslora", "rank_pattern", "task_type", "auto_mapping", "x"]),
        JSON,
        min_size=1,
    )
)  # fmt: skip
def test_any_lora_config_is_a_plain_one_or_refused_with_its_place(changes, lora):  # noqa: F811
    path = lora / PEFT_FOLDER / PEFT_CONFIG
    sound = path.read_text()
    path.write_text(json.dumps(json.loads(sound) | changes))
    try:
        found = load_lora(lora)
    except ValueError as error:
        assert str(lora) in str(error)
    else:
        assert found.rank == 2 and all(v.isfinite().all() for v in found.state.values())
    finally:
        path.write_text(sound)
