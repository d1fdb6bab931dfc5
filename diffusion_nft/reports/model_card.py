"""Model card of an exported LoRA: base model, training, usage and evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from diffusion_nft.evaluation.options import EvalOptions
from diffusion_nft.models import PIPELINE_INDEX
from diffusion_nft.models.hub import public_name
from diffusion_nft.models.lora import DIFFUSERS_WEIGHTS, PEFT_FOLDER, Lora
from diffusion_nft.models.precision import COMPUTE_DTYPES
from diffusion_nft.runs.checkpoint import STATE, read_json
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.tracking.metrics import METRICS_FILE
from diffusion_nft.tracking.summary import comparable, images_file, stage_evaluations
from diffusion_nft.utils.files import read_object
from diffusion_nft.utils.tables import markdown_table
from diffusion_nft.validation.flat import unflatten

TEMPLATE = Path(__file__).with_name("model_card.md")
CARD, SAMPLES = "README.md", "samples.png"
# Keys and sections of the configuration that describe a machine.
UNSHARED_KEYS = (
    "run_name",
    "save_dir",
    "resume_from",
    "train.lora_path",
    "reward_options.",
    "reward_servers.",
    "reward_server_timeout_seconds",
    "checkpoint.",
    "perf.",
    "log.",
    "distributed.",
)
# Suffixes of keys for local paths or public names.
PATH_KEYS = ("dataset", "pretrained.model")


def write_card(
    options: EvalOptions, lora: Lora, folder: Path, *, repo: str | None, merged: bool
) -> None:
    """Writes README.md and, if the run has it, the image of samples before and after training.

    ``merged``: ``folder`` has a pipeline with the LoRA merged.
    """
    base = public_name(options.config.pretrained.model)
    built_in = base == BUILT_IN_MODEL and not merged
    # Quoted as JSON, as names are not trusted.
    source = "PIPELINE_DIR" if built_in else json.dumps((repo or ".") if merged else base)
    if merged:
        index = read_object(folder / PIPELINE_INDEX)
        missing = [p for p in ("text_encoder_3", "tokenizer_3") if index.get(p) == [None, None]]
        source += "".join(f", {part}=None" for part in missing)
    template = Template(TEMPLATE.read_text("utf-8"), trim_blocks=True, undefined=StrictUndefined)
    text = template.render(
        title=repo or _title(options, base),
        base=base,
        built_in=built_in,
        rank=lora.rank,
        repo=repo,
        merged=merged,
        source=source,
        dtype=COMPUTE_DTYPES[options.config.mixed_precision],
        config=options.config,
        weights_file=DIFFUSERS_WEIGHTS,
        peft_folder=PEFT_FOLDER,
        run=options.run,
        **(_about_run(options.run, options.checkpoint, folder) if options.checkpoint else {}),
    )
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def _title(options: EvalOptions, base: str) -> str:
    """Run and checkpoint, or name of the LoRA on the hub; never a local path."""
    if options.checkpoint:
        return options.name
    return f"LoRA of {base}" if Path(options.lora).exists() else options.lora


def _about_run(run: dict[str, Any], checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Template values of the run; copies its image to ``folder``."""
    state = read_json(checkpoint / STATE)
    run_dir, stage = checkpoint.resolve().parents[1], state.get("stage", 0)
    image = run_dir / images_file(stage)
    # The image shows the weights at the end of the stage.
    shown = state["epoch"] >= run["num_epochs"] and image.is_file()
    if shown:
        shutil.copyfile(image, folder / SAMPLES)
    return {
        "state": state,
        "stage": stage,
        "dataset": public_name(run["dataset"]),
        "rewards": markdown_table(
            ["reward", "weight"],
            [[name, f"{weight:g}"] for name, weight in unflatten(run).reward_fn.items()],
        ),
        "evaluations": _evaluations(run_dir / METRICS_FILE, state["epoch"], stage),
        "samples": SAMPLES if shown else "",
        "configuration": _shared_json(run),
    }


def _evaluations(path: Path, epoch: int, stage: int) -> str:
    """Table of the last evaluation of ``stage`` (0: of a run without stages) up to ``epoch`` and
    the first comparable one; empty if there is none.
    """
    rows = comparable([row for row in stage_evaluations(path, stage) if row["epoch"] <= epoch])
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    names = [key for key, value in last.items() if key.startswith("eval/") and value is not None]
    names.sort(key=lambda name: (name.startswith("eval/tag/"), name))
    return markdown_table(
        ["mean over the test prompts", f"epoch {first['epoch']}", f"epoch {last['epoch']}"],
        [
            [name.removeprefix("eval/"), *(_score(row.get(name)) for row in (first, last))]
            for name in names
        ],
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shared_json(run: dict[str, Any]) -> str:
    """The configuration of the run, without keys that describe a machine."""
    sections = tuple(name for name in UNSHARED_KEYS if name.endswith("."))
    kept = {
        key: public_name(value) if key.endswith(PATH_KEYS) else value
        for key, value in sorted(run.items())
        if key not in UNSHARED_KEYS and not key.startswith(sections)
    }
    return json.dumps(kept, indent=1)
