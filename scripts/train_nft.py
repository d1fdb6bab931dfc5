"""Fine-tunes a text-to-image model with DiffusionNFT.

    torchrun --nproc_per_node=8 scripts/train_nft.py --config config/nft.py:sd3_geneval

Images and updates are the same on any number of processes.  Every key of the preset can be
overridden, as in ``--config.train.learning_rate=1e-4``.  The same command continues an interrupted
run.
"""

import os
import sys
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from diffusion_nft.distributed.ranks import LaunchError, LostContact, distributed
from diffusion_nft.utils.paths import expand
from diffusion_nft.validation.schema import SCHEMA, expand_paths, unknown_key, validate

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="path:preset")
PRESET = "a preset is named as config/nft.py:PRESET"
# Keys that map reward names to values -> example.
MAPPINGS = {
    "reward_fn": "{'ocr': 1.0}",
    "reward_servers": "{'ocr': ('http://host:8000',)}",
    "reward_options": "{'ocr': {'backend': 'paddleocr'}}",
}
# All of these keys may change when a run continues.
OUT_OF_MEMORY_HINT = (
    "on a GPU out of memory, lower train.batch_size, sample.batch_size, eval.batch_size or "
    "perf.vae_batch_size, or turn on perf.gradient_checkpointing or perf.offload_text_encoders"
)
LEAVE_OUT_HINT = (
    "rerunning would meet them again: --config.max_unscored=N leaves out up to N images per epoch "
    "or evaluation and counts them"
)
FIX_REWARD_HINT = (
    "once the cause is fixed (or with --config.max_unscored=N, which leaves out up to N images, "
    "if the reward fails on single ones)"
)


def refuse(message: str) -> NoReturn:
    """Ends the program; only the first process of each node prints ``message``."""
    sys.exit(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def _mapping(key: str) -> bool:
    """True for an entry of a mapping of rewards."""
    return key.startswith(tuple(f"{name}." for name in MAPPINGS))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses preset and overrides; an invalid one ends the program with one line."""
    argv, preset = list(argv), ""
    for i, argument in enumerate(argv):
        name, sign, value = argument.partition("=")
        key = name.removeprefix("--config.")
        if key != name and key not in SCHEMA and not _mapping(key):
            refuse(f"--config.{key} {unknown_key(key)}")
        if name == "--config":
            try:
                preset = expand(value if sign else "".join(argv[i + 1 : i + 2]))
            except ValueError as error:
                refuse(f"--config {value!r} {error}")
            argv[i] = f"--config={preset}" if sign else argument
            if preset and not os.path.isfile(preset.partition(":")[0]):
                refuse(f"--config {preset}: no such file; {PRESET}")
    if not preset and not any(a.lstrip("-").startswith("help") for a in argv):
        refuse(f"--config is missing: {PRESET}")
    try:
        return flags.FLAGS(argv)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, flags.Error) as error:
        # absl prepends a line to the preset's message.
        message = str(error).splitlines()[-1]
        for argument in argv:
            name = argument.partition("=")[0].removeprefix("--config.")
            mapping, _, reward = name.partition(".")
            if _mapping(name) and message.strip("'\"") == reward.partition(".")[0]:
                message = (
                    f"--config.{name}: {mapping} of this preset does not hold {reward!r}; give the "
                    f'whole mapping, as in --config.{mapping}="{MAPPINGS[mapping]}"'
                )
        refuse(message)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; overrides look like --config.KEY=VALUE")
    config = CONFIG.value
    try:
        validate(config)
    except ValueError as error:
        refuse(str(error))
    expand_paths(config)
    # Importing the model libraries takes seconds, which an invalid configuration need not wait for.
    from torch import OutOfMemoryError

    from diffusion_nft.distributed.preemption import Preempted
    from diffusion_nft.rewards.combine import RewardError, UnscoredError
    from diffusion_nft.run import StartError, run
    from diffusion_nft.tracking.monitor import Alarm
    from diffusion_nft.utils.files import DiskError

    go_on = f"the same command continues the run in {config.save_dir}"
    minutes = config.distributed.timeout_minutes
    try:
        with distributed(minutes) as dist:
            try:
                run(config, dist)
            except StartError as error:
                sys.exit(str(error))
            except (DiskError, FloatingPointError) as error:
                refuse(str(error))
            except Alarm as error:
                refuse(f"{error}; the state is saved, {go_on}")
            except UnscoredError as error:
                refuse(f"{error}; the state is saved; {LEAVE_OUT_HINT}")
            except RewardError as error:
                refuse(f"{error}; the state is saved; {FIX_REWARD_HINT}, {go_on}")
            except OutOfMemoryError as error:
                sys.exit(f"{str(error).splitlines()[0]}\n{OUT_OF_MEMORY_HINT}; {go_on}")
            except Preempted as stop:
                dist.log(f"{stop}; {go_on}")
    except LaunchError as error:
        refuse(str(error))
    except LostContact as error:
        sys.exit(f"{error} (distributed.timeout_minutes = {minutes:g}); {go_on}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
