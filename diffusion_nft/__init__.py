"""DiffusionNFT: online reinforcement learning of text-to-image models on the forward process."""

import os

# libgomp reads this when torch is imported.  Its threads otherwise spin for a long time at every
# barrier, and next to any other busy process an epoch on CPUs takes several times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
