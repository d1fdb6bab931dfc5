"""Makes a folder to share out of a checkpoint's LoRA, or of a LoRA in another layout.

    python scripts/export_lora.py --checkpoint_path logs/nft/sd3/geneval --output_dir shared
    python scripts/export_lora.py --lora_hf_path OWNER/NAME --merge --output_dir shared

Writes lora/ (PEFT), pytorch_lora_weights.safetensors (diffusers) and README.md, a model card.
--merge adds the base pipeline with the LoRA in the transformer's weights, stored in
--mixed_precision. The folder gets all files at the end, or none. Nothing leaves this machine
without --push.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from ml_collections import ConfigDict
from safetensors import SafetensorError

from diffusion_nft.command_line import command, user_path
from diffusion_nft.distributed.ranks import distributed
from diffusion_nft.evaluation.options import EvalOptions, add_model_flags, resolve_options
from diffusion_nft.evaluation.results import write_json
from diffusion_nft.models import PIPELINE_INDEX
from diffusion_nft.models.hub import base_note, fetch_pipeline, public_name, weights_variant
from diffusion_nft.models.lora import (
    DIFFUSERS_WEIGHTS,
    PEFT_FOLDER,
    Lora,
    export_lora,
    load_lora,
    merge_lora,
)
from diffusion_nft.models.precision import COMPUTE_DTYPES
from diffusion_nft.models.sd3 import T5, T5_TOKENIZER
from diffusion_nft.runs.checkpoint import STATE, read_json
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.tracking.metrics import METRICS_FILE
from diffusion_nft.tracking.summary import comparable, images_file, stage_evaluations
from diffusion_nft.utils.files import DiskError, read_object

TRANSFORMER = "transformer"
CARD, SAMPLES = "README.md", "samples.png"
# In the output folder until everything is written.
MARKER = ".unfinished"
# The oldest versions with which the exported files were tried.
OLDEST_DIFFUSERS, OLDEST_PEFT = "0.33.1", "0.10.0"
# Keys and sections of a run's configuration that say nothing of the weights, but of a machine.
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


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser, lora_required=True)
    add = parser.add_argument
    add("--output_dir", type=user_path, required=True, help="a new or empty folder")
    add("--merge", action="store_true", help="also write a pipeline with the LoRA merged")
    add("--push", metavar="OWNER/NAME", help="upload the folder to the hub under this name")
    args = parser.parse_args()
    if args.push is not None:
        validate_repo_id(args.push)
        if "/" not in args.push:
            parser.error(f"--push takes OWNER/NAME, not {args.push}")
    if args.output_dir.exists() and {p.name for p in args.output_dir.iterdir()} - {MARKER}:
        parser.error(f"--output_dir {args.output_dir} is not empty")
    return args


def main() -> None:
    """Reads the LoRA, writes the folder, and pushes it where that is asked for."""
    args = parse_flags()
    options = resolve_options(args)
    with distributed(timeout_minutes=60) as dist:
        lora = load_lora(options.fetch(dist))
    given = getattr(args, "pretrained.model")
    if not (options.run or given) and lora.base_model:
        options.config.pretrained.model = lora.base_model
    base = options.config.pretrained.model
    if note := base_note(lora, base):
        print(note)
    merged = merge(options.config, lora) if args.merge else None
    with filling(args.output_dir) as folder:
        if merged:
            write_pipeline(*merged, folder)
        export_lora(folder, Lora(lora.state, public_name(base)))
        write_card(options, lora, folder, repo=args.push, merged=args.merge)
    print(f"exported: {args.output_dir}")
    if args.push:
        api = HfApi()
        api.create_repo(args.push, exist_ok=True)
        url = api.upload_folder(repo_id=args.push, folder_path=args.output_dir)
        print(f"pushed: {url}")


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A place for the files of ``folder``, which come there at the end of the block, or not at all.

    Raises DiskError if the disk refuses.
    """
    missing, unfinished = not folder.exists(), folder / MARKER
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            path.rename(folder / path.name)
        unfinished.rmdir()
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{folder} could not be filled: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if missing and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def merge(config: ConfigDict, lora: Lora) -> tuple[Path, Any]:
    """The folder of the base pipeline, and its transformer with the LoRA in its weights."""
    base = fetch_pipeline(config.pretrained.model, config.pretrained.revision)
    stored = COMPUTE_DTYPES[config.mixed_precision]
    # A sum in half precision would lose most of the small change that a LoRA is.
    exact = torch.promote_types(stored, torch.float32)
    transformer: Any = AutoModel.from_pretrained(
        str(base),
        subfolder=TRANSFORMER,
        dtype=exact,
        variant=weights_variant(base / TRANSFORMER),
    )
    merged: Any = merge_lora(transformer, lora)
    return base, merged.to(stored)


def write_pipeline(base: Path, transformer: Any, to: Path) -> None:
    """Writes the pipeline in ``base`` into ``to``, with another transformer.

    Its index names no part that ``base`` lacks (T5), and weights that are stored in a variant alone
    (fp16) get plain names.
    """
    transformer.save_pretrained(to / TRANSFORMER)
    index = read_object(base / PIPELINE_INDEX)
    parts = [part for part, classes in index.items() if isinstance(classes, list)]
    absent = [part for part in parts if not (base / part).is_dir()]
    if absent:
        write_json(to / PIPELINE_INDEX, index | {part: [None, None] for part in absent})
    else:
        shutil.copyfile(base / PIPELINE_INDEX, to / PIPELINE_INDEX)
    for part in {*parts} - {*absent, TRANSFORMER}:
        shutil.copytree(base / part, to / part)
        if any((to / part).glob("*.safetensors")) and (variant := weights_variant(to / part)):
            for path in list((to / part).iterdir()):
                if path.suffixes[-2:] == [f".{variant}", ".json"]:  # an index of shards
                    path.write_text(path.read_text("utf-8").replace(f".{variant}-", "-"), "utf-8")
                path.rename(path.with_name(path.name.replace(f".{variant}", "", 1)))


def write_card(
    options: EvalOptions, lora: Lora, folder: Path, *, repo: str | None, merged: bool
) -> None:
    """Writes README.md, and beside it the run's before and after where it has left them."""
    base = public_name(options.config.pretrained.model)
    head = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", "- lora"]
    if "/" in base:
        relation = "finetune" if merged else "adapter"
        head += [f"base_model: {base}", f"base_model_relation: {relation}"]
    about, results = [], []
    if options.checkpoint:
        state = read_json(options.checkpoint / STATE)
        run_dir = options.checkpoint.resolve().parents[1]
        about = training(options.run, state)
        stage = state.get("stage", 0)
        results = evaluations(run_dir / METRICS_FILE, state["epoch"], stage)
        images = run_dir / images_file(stage)
        # Of an earlier checkpoint than the stage's last, the images would show other weights.
        if state["epoch"] >= options.run["num_epochs"] and images.is_file():
            shutil.copyfile(images, folder / SAMPLES)
            results += [f"![Test prompts before and after training, with scores]({SAMPLES})", ""]
        results += ["## Configuration", "", "```json", shared_json(options.run), "```", ""]
    lines = [
        *("---", *head, "---", f"# {repo or title(options, base)}", ""),
        f"A LoRA of `{base}`, rank {lora.rank}. Its trained strength is in the weights: alpha is",
        *("the rank, for every program that reads them.", ""),
        *about,
        *("## Use", "", *snippet(options.config, base, repo or ".", folder if merged else None)),
        "",
        f"The LoRA alone: `{DIFFUSERS_WEIGHTS}` for diffusers (>= {OLDEST_DIFFUSERS}) and ComfyUI,",
        *(f"`{PEFT_FOLDER}/` for PEFT (>= {OLDEST_PEFT}).", ""),
        *results,
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def title(options: EvalOptions, base: str) -> str:
    """The card's: run and checkpoint, or the LoRA's name on the hub; no folders of this machine."""
    if options.checkpoint:
        return options.name
    return f"LoRA of {base}" if Path(options.lora).exists() else options.lora


def training(run: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """What the weights were trained on."""
    rewards = [(k.split(".", 1)[1], v) for k, v in run.items() if k.startswith("reward_fn.")]
    last = f"the last of them, those of stage {state['stage']}, " if state.get("stage") else ""
    return [
        f"Trained by online reinforcement learning, DiffusionNFT "
        f"([arXiv 2509.16117](https://arxiv.org/abs/2509.16117)), for {state['epoch']} epochs "
        f"({state['updater']['step']} optimizer steps), {last}on the prompts of "
        f"`{public_name(run['dataset'])}`. The weights are an average over the last steps (EMA).",
        "",
        *table(("reward", "weight"), [(name, f"{weight:g}") for name, weight in rewards]),
        "",
    ]


def evaluations(path: Path, epoch: int, stage: int) -> list[str]:
    """The last evaluation of ``stage`` (0: of a run without stages) up to ``epoch``, and the first
    that compares with it; nothing if there is none.
    """
    rows = comparable([row for row in stage_evaluations(path, stage) if row["epoch"] <= epoch])
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    names = [key for key, value in last.items() if key.startswith("eval/") and value is not None]
    shown = [
        (name.removeprefix("eval/"), *(_number(row.get(name)) for row in (first, last)))
        for name in sorted(names, key=lambda name: (name.startswith("eval/tag/"), name))
    ]
    columns = ("mean over the test prompts", f"epoch {first['epoch']}", f"epoch {last['epoch']}")
    return ["## Evaluation", "", *table(columns, shown), ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    ruler = "|".join(["---", *["---:"] * (len(columns) - 1)])
    return [f"| {' | '.join(columns)} |", f"|{ruler}|", *(f"| {' | '.join(r)} |" for r in rows)]


def shared_json(run: dict[str, Any]) -> str:
    """The run's configuration without what is this machine's business."""
    sections = tuple(name for name in UNSHARED_KEYS if name.endswith("."))
    kept = {
        key: public_name(value) if key.endswith(PATH_KEYS) else value
        for key, value in sorted(run.items())
        if key not in UNSHARED_KEYS and not key.startswith(sections)
    }
    return json.dumps(kept, indent=1)


def snippet(config: ConfigDict, base: str, where: str, merged: Path | None) -> list[str]:
    """A program that draws an image with plain diffusers; ``merged``: the folder of the pipeline
    that has the LoRA in its weights, if there is one.
    """
    dtype = COMPUTE_DTYPES[config.mixed_precision]
    lines = ["import torch", "from diffusers import StableDiffusion3Pipeline"]
    # JSON's quoting, as the names may be a stranger's.
    source = json.dumps(where if merged else base)
    if base == BUILT_IN_MODEL and not merged:
        lines += ["from diffusion_nft.shapes.model import PIPELINE_DIR"]
        source = "PIPELINE_DIR"
    if merged:
        index = read_object(merged / PIPELINE_INDEX)
        source += "".join(f", {part}=None" for part in (T5, T5_TOKENIZER) if index[part][0] is None)
    lines += [
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"pipe = StableDiffusion3Pipeline.from_pretrained({source}, torch_dtype={dtype})",
    ]
    if not merged:
        lines += [f'pipe.load_lora_weights("{where}", weight_name="{DIFFUSERS_WEIGHTS}")']
    lines += [
        "image = pipe.to(device)(",
        '    "a red circle above a blue square",',
        f"    num_inference_steps={config.eval.num_steps},",
        f"    guidance_scale={config.eval.guidance_scale},",
        f"    height={config.resolution},",
        f"    width={config.resolution},",
        f"    max_sequence_length={config.pretrained.max_sequence_length},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'image.save("image.png")',
    ]
    here = [] if where != "." else ["In this folder:", ""]
    return [*here, "```python", *lines, "```"]


if __name__ == "__main__":
    command(main)
