"""Fine-tunes a text-to-image model with DiffusionNFT.

    torchrun --nproc_per_node=8 scripts/train_nft_sd3.py --config config/nft.py:sd3_geneval

Any number of processes, from one, makes the same images and the same updates.  Every key of the
preset can be overridden, as in ``--config.train.learning_rate=1e-4``.  The same command continues
an interrupted run.
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

from diffusion_nft.distributed import distributed
from diffusion_nft.validation import ConfigError, validate

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="path:preset")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    """Validates, then trains."""
    del argv
    config = CONFIG.value
    try:
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        sys.exit(str(error))
    # Loading torch's model libraries takes seconds: a wrong configuration should not have to wait.
    from diffusion_nft.trainer import Trainer

    with distributed(config.distributed.timeout_minutes) as dist:
        Trainer(config, dist).run()


if __name__ == "__main__":
    app.run(main)
