"""Kills runs of the smoke preset at random moments and counts the correct recoveries.

    python tests/reliability/kill_tally.py --count 50 --seed 0 --out FOLDER

Each experiment stops a run (KINDS in tests/reliability/experiments.py) in one of its phases (PHASES
in faults.py), reruns the same command, and compares weights, moments, counters and log with an
uninterrupted run; they are bitwise equal on the same number of processes.  Writes tally.md,
results.jsonl and the failed runs to FOLDER.  Exits with 1 if a run failed.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffusion_nft.utils.tables import markdown_table
from tests.reliability.experiments import KINDS, Laboratory, Result, plan
from tests.reliability.faults import PHASES


def table(results: list[Result]) -> str:
    """Numbers of experiments and of correct recoveries, by kind and phase."""

    def phase(result: Result) -> str:
        moment = result.strike.partition(",")[0]
        return moment if moment in PHASES else "by the clock"

    tables = []
    for title, names, of in (
        ("stop", [kind.name for kind in KINDS], lambda result: result.kind),
        ("phase", [*PHASES, "by the clock"], phase),
    ):
        rows = []
        for name in (*names, "all"):
            group = [result for result in results if name in (of(result), "all")]
            if group:
                rows.append([name, str(len(group)), str(sum(not one.problems for one in group))])
        tables.append(markdown_table([title, "experiments", "recovered"], rows))
    return "\n\n".join(tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="experiments")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--first", type=int, default=0, help="number of the first experiment")
    parser.add_argument("--out", type=Path, help="a folder; default: a temporary one")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill-tally-"))
    laboratory, results = Laboratory(folder), []
    (folder / "results.jsonl").unlink(missing_ok=True)
    for index in range(options.first, options.first + options.count):
        kind, phase = plan(index)
        rng = random.Random(f"{options.seed}:{index}")
        name = f"experiment-{index:03d}"
        strike = laboratory.choose(kind, phase, rng)
        result = laboratory.run(kind, strike, name, rng)
        results.append(result)
        with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": index, **asdict(result)}) + "\n")
        verdict = "; ".join(result.problems) or "recovered"
        print(
            f"{index:3d}  {result.kind}: {result.strike}; exits {result.exits}, "
            f"{result.seconds:.0f} s: {verdict}",
            flush=True,
        )
        if not result.problems:
            shutil.rmtree(folder / name)
            (folder / f"{name}.log").unlink()
    text = table(results)
    (folder / "tally.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {folder}")
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
