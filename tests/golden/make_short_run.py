"""Records a short run of the built-in model: losses, gradient norms, scores, norms of the weights.

    python -m tests.golden.make_short_run

In float64, so that the numbers are those of any machine to many digits.  Remake the file only with
a change that is meant to change numbers, and say so in CHANGELOG.md.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.launch import ROOT, train_here

GOLDEN = Path(__file__).with_name("short_run.json")
SETTINGS: dict[str, Any] = {
    "mixed_precision": "fp64",
    "eval.num_steps": 3,
    "sample.solver": "dance",
    "sample.noise_level": 0.5,
    "train.num_inner_epochs": 2,
    "log.image_freq": 0,
}


def short_run(save_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Trains two epochs into ``save_dir``; the metrics of each row, and norms by adapter."""
    trainer = train_here(save_dir, SETTINGS | overrides)
    rows = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss/", "optim/", "reward/", "eval/")
    norms = {
        adapter: sum(float(v.double().square().sum()) for v in tensors.values()) ** 0.5
        for adapter in ("current", "old", "ema")
        if (tensors := trainer.policy.state(adapter))
    }
    return {
        "metrics": [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows],
        "norms": norms,
    }


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "config")]
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(short_run(Path(folder)), indent=1) + "\n")
