"""The model card of an exported LoRA: the base model, its training, use, and evaluations."""

import json
import shutil
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from tabulate import tabulate

from diffusion_nft.evaluation.options import EvalOptions
from diffusion_nft.models import PIPELINE_INDEX
from diffusion_nft.models.hub import public_name
from diffusion_nft.models.lora import DIFFUSERS_WEIGHTS, PEFT_FOLDER, Lora
from diffusion_nft.models.precision import COMPUTE_DTYPES
from diffusion_nft.models.sd3 import T5, T5_TOKENIZER
from diffusion_nft.runs.checkpoint import STATE, read_json
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.tracking.metrics import METRICS_FILE
from diffusion_nft.tracking.summary import comparable, images_file, stage_evaluations
from diffusion_nft.utils.files import read_object
from diffusion_nft.validation.flat import unflatten

TEMPLATE = Path(__file__).with_name("model_card.md")
CARD, SAMPLES = "README.md", "samples.png"
# Keys and sections of a run's configuration that describe a machine, not the weights.
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
# These are local paths or public names, those of stages included.
PATH_KEYS = ("dataset", "pretrained.model")


def write_card(
    options: EvalOptions, lora: Lora, folder: Path, *, repo: str | None, merged: bool
) -> None:
    """Writes README.md and, where the run has left it, the image of before and after training.

    ``merged``: ``folder`` holds a pipeline with the LoRA in its weights.
    """
    base = public_name(options.config.pretrained.model)
    built_in = base == BUILT_IN_MODEL and not merged
    # JSON's quoting, as the names may be a stranger's.
    source = "PIPELINE_DIR" if built_in else json.dumps((repo or ".") if merged else base)
    if merged:
        index = read_object(folder / PIPELINE_INDEX)
        source += "".join(f", {part}=None" for part in (T5, T5_TOKENIZER) if index[part][0] is None)
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
    """Run and checkpoint, or the LoRA's name on the hub; no folders of this machine."""
    if options.checkpoint:
        return options.name
    return f"LoRA of {base}" if Path(options.lora).exists() else options.lora


def _about_run(run: dict[str, Any], checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The template's values that a run adds; copies its image into ``folder``."""
    state = read_json(checkpoint / STATE)
    run_dir, stage = checkpoint.resolve().parents[1], state.get("stage", 0)
    image = run_dir / images_file(stage)
    # Of an earlier checkpoint than the stage's last, the image would show other weights.
    shown = state["epoch"] >= run["num_epochs"] and image.is_file()
    if shown:
        shutil.copyfile(image, folder / SAMPLES)
    return {
        "state": state,
        "stage": stage,
        "dataset": public_name(run["dataset"]),
        "rewards": tabulate(
            unflatten(run).reward_fn.items(),
            headers=("reward", "weight"),
            tablefmt="pipe",
            floatfmt="g",
        ),
        "evaluations": _evaluations(run_dir / METRICS_FILE, state["epoch"], stage),
        "samples": SAMPLES if shown else "",
        "configuration": _shared_json(run),
    }


def _evaluations(path: Path, epoch: int, stage: int) -> str:
    """The last evaluation of ``stage`` (0: of a run without stages) up to ``epoch``, and the first
    that compares with it; empty if there is none.
    """
    rows = comparable([row for row in stage_evaluations(path, stage) if row["epoch"] <= epoch])
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    names = [key for key, value in last.items() if key.startswith("eval/") and value is not None]
    names.sort(key=lambda name: (name.startswith("eval/tag/"), name))
    return tabulate(
        [(name.removeprefix("eval/"), first.get(name), last[name]) for name in names],
        headers=("mean over the test prompts", f"epoch {first['epoch']}", f"epoch {last['epoch']}"),
        tablefmt="pipe",
        floatfmt=".4f",
        missingval="–",
    )


def _shared_json(run: dict[str, Any]) -> str:
    """The run's configuration, without keys that describe this machine."""
    sections = tuple(name for name in UNSHARED_KEYS if name.endswith("."))
    kept = {
        key: public_name(value) if key.endswith(PATH_KEYS) else value
        for key, value in sorted(run.items())
        if key not in UNSHARED_KEYS and not key.startswith(sections)
    }
    return json.dumps(kept, indent=1)
