"""Tables and figures of experiments."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from scipy import special

from diffusion_nft.experiments import comparison, plots, tables
from tests.scripts.in_process import call, script


@pytest.fixture(scope="module")
def plot():
    return script("experiments_plot")


# Final strict accuracies by variant and seed; all start at .25 and cost 2000 forward-equivalents.
FINALS = {
    "base": {1: 0.50, 2: 0.60, 3: 0.55},
    "better": {1: 0.60, 2: 0.72, 3: 0.63, 4: 0.70},
    "short": {1: 0.50, 2: 0.50},
    "shifted": {1: 0.40, 2: 0.50, 3: 0.45},
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "made"
    folder.mkdir(parents=True)
    machine = {"cpu": "Cpu", "cores": 2, "threads": "1", "jobs": 2, "device": "cpu"}
    for variant, finals in FINALS.items():
        for seed, final in finals.items():
            about = {
                "experiment": "made",
                "question": "Which?",
                "baseline": "base",
                "variant": variant,
            }
            about |= {"seed": seed, "preset": "p", "changes": {}, "machine": machine}
            about |= {"git_revision": "0123456789ab", "git_dirty": variant == "short"}
            lines = [about | {"backward_over_forward": 1.25}]
            for epoch, strict in enumerate((0.25, (0.25 + final) / 2, final)):
                line = {"epoch": epoch, "seconds": 10.0 * epoch * seed, "eval/total": strict}
                line |= {"forward_equivalents": 1000.0 * epoch, "eval/diversity": None}
                spent = {"epoch": epoch, "forward_equivalents": 1000.0 * epoch}
                lines += [spent | {"reward/mean": 0.5}]
                line |= {"eval/shapes/strict": strict, "eval/shapes/stricter": 0.4}
                lines += [line | {"eval/tag/colors/shapes/strict": strict / 2}]
            text = "\n".join(map(json.dumps, lines)) + "\n"
            (folder / f"{variant}-seed{seed}.jsonl").write_text(text)
    return folder


def colours(path, height: int) -> set[tuple[int, ...]]:
    """Colours of a figure that is at least ``height`` high."""
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > height
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def blue() -> tuple[int, ...]:
    """Colour of the first variant."""
    return tuple(bytes.fromhex(plots.COLOURS[0].removeprefix("#")))


def row_of(results, variant: str) -> dict[str, str]:
    head, *rows = tables.by_variant(comparison.read(results), "base")
    return next(dict(zip(head, row, strict=True)) for row in rows if row[0] == variant)


def test_the_table_matches_a_hand_computation(results):
    assert list(comparison.read(results)) == ["base", "better", "shifted", "short"]
    row = row_of(results, "base")
    # Gains .25, .35, .30: mean .30, deviation .05; Student's t at 97.5 % with 2 degrees is 4.303.
    assert row["gain ± 95 %"] == f"+.300 ± .{4.303 * 0.05 / 3**0.5 * 1e3:.0f}"
    assert row["strict"] == ".250 → .550" and row["stricter"] == ".400"
    assert row["seconds"] == "40" and row["forward-equivalents, thousands"] == "2.0"
    assert row["diversity"] == row["p"] == "–"


def test_the_paired_test_is_over_common_seeds(results):
    row = row_of(results, "better")
    differences = np.array([0.10, 0.12, 0.08])
    error = differences.std(ddof=1) / 3**0.5
    low, high = 0.10 - 4.303 * error, 0.10 + 4.303 * error
    expected = f"+.100 [+{low:.3f}, +{high:.3f}], n=3".replace("0.", ".")
    assert row["against base at equal compute [95 %]"] == expected
    # The two-sided tail of Student's t is an incomplete beta function.
    t, df = 0.10 / error, 2
    assert row["p"] == f"{special.betainc(df / 2, 0.5, df / (df + t * t)):.3f}"[1:]


def test_holms_adjustment_is_that_of_his_paper():
    # Four tests: times 4, 3, 2, 1 from the smallest, never below a smaller one's, at most 1.
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan}
    adjusted = comparison.holm(ps)
    assert list(adjusted) == list(ps) and math.isnan(adjusted.pop("e"))
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert comparison.holm({"a": 0.9, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert comparison.holm({}) == {}


def test_the_adjustment_is_for_the_tests_of_the_table(results):
    for seed, final in {1: 0.45, 2: 0.50, 3: 0.49}.items():
        text = (results / f"shifted-seed{seed}.jsonl").read_text()
        about, *rows = map(json.loads, text.splitlines())
        rows[-1]["eval/shapes/strict"] = final
        text = "\n".join(map(json.dumps, [about, *rows]))
        (results / f"shifted-seed{seed}.jsonl").write_text(text + "\n")
    better, shifted = (row_of(results, variant) for variant in ("better", "shifted"))
    assert float(better["p"]) < float(shifted["p"]) == float(shifted["p, Holm"])
    assert float(better["p, Holm"]) == pytest.approx(2 * float(better["p"]), abs=1e-3)
    assert row_of(results, "short")["p, Holm"] == "–"


def test_training_metrics_and_the_comparison_at_equal_time(results):
    (results / "better-seed4.jsonl").unlink()
    for seed in (1, 2, 3):
        path = results / f"better-seed{seed}.jsonl"
        lines = [line for line in path.read_text().splitlines() if "reward/mean" not in line]
        for number, reward in enumerate((0.1, 0.2, 0.6, 0.9)):
            row = {"epoch": number, "reward/mean": reward, "loss/kl": 0.01 * number}
            lines.append(json.dumps(row))
        path.write_text("\n".join(lines) + "\n")
    head, _, better, *_ = tables.in_training(comparison.read(results), "base")
    row = dict(zip(head, better, strict=True))
    assert row["reward, first → last 3 epochs"] == ".300 → .567"
    assert row["loss/kl, last epoch"] == ".030"
    assert row["strict after epoch"] == "0: .250, 1: .450, 2: .650"
    # All runs of seed 1 take 20 s, where those of seed 2 and 3 are at 1/2 and 1/3 of their gains.
    ours, theirs = (0.60, 0.485, 0.25 + 0.38 / 3), (0.50, 0.425, 0.35)
    mean = np.mean(np.subtract(ours, theirs))
    text = row["against base at equal seconds [95 %]"]
    assert text.startswith(f"+{mean:.3f} [".replace("0.", ".")) and text.endswith(", at 20 s")


def test_where_the_baseline_reaches_a_variants_end(results):
    # The baseline reaches .40, .50 and .45 after 1200, 1429 and 1333 of 2000 forward-equivalents.
    row = row_of(results, "shifted")
    assert row["base is there after"] == ".660 (.600 to .714)"
    row = row_of(results, "better")
    assert row["base is there after"] == "0 of 3"
    found = comparison.read(results)
    better, base = found["better"], found["base"]
    # Seed 2 of the baseline reaches the .60 of "better" after 2000, but never .63.
    pair = {1: better[1], 2: better[3]}, {1: base[2], 2: base[2]}
    assert comparison.head_start(*pair) == "1 of 2: 1.000 (1.000 to 1.000)"
    assert comparison.share(10.5) == "10.500" and comparison.share(-0.5) == "-.500"


@pytest.mark.parametrize(
    "variant, text", [("short", "-.050, n=2: not tested"), ("shifted", "-.100 for each of n=3")]
)
def test_few_or_equal_pairs_are_not_tested(results, variant, text):
    row = row_of(results, variant)
    assert row["against base at equal compute [95 %]"] == text and row["p"] == "–"


def test_two_variants_are_compared_where_their_cheapest_run_ended(results):
    for seed in (1, 2, 3, 4):
        path = results / f"better-seed{seed}.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    assert comparison.read(results)["base"][1].at(1500) == pytest.approx(0.4375)
    row = row_of(results, "better")
    # Half of the way from .25: differences of half the size.
    assert row["against base at equal compute [95 %]"].startswith("+.050 [")
    assert row["at, thousands"] == "1.0" and row["strict"] == ".250 → .456"
    assert row_of(results, "shifted")["at, thousands"] == "2.0"


def test_a_curve_is_the_mean_with_its_interval(results):
    found = comparison.read(results)
    x, means, halves = plots.curve(found["base"], "seconds")
    assert x == [0, 20, 40] and means == pytest.approx([0.25, 0.40, 0.55])
    assert halves == pytest.approx([0, 4.303 * 0.025 / 3**0.5, 4.303 * 0.05 / 3**0.5], rel=1e-3)
    x, means, halves = plots.curve({1: found["base"][1]}, "forward_equivalents")
    assert x == [0, 1000, 2000] and means == [0.25, 0.375, 0.5] and np.isnan(halves).all()


def test_figure_and_page_are_made_and_the_page_tells_how(plot, results, tmp_path, capsys):
    output = tmp_path / "figures"
    call(plot, "made", "--results", results.parent, "--output", output)
    page = (output / "made.md").read_text()
    assert page in capsys.readouterr().out
    again = f"python scripts/experiments_plot.py made --results {results.parent} --output {output}"
    assert f"    {again}\n" in page
    assert "--variants base shifted --seeds 1 2 3 --jobs 2\n" in page
    assert "--variants better --seeds 1 2 3 4 --jobs 2\n" in page
    assert "--variants short --seeds 1 2 --jobs 2\n" in page
    lines = [re.sub(r" +\|", " |", line) for line in page.splitlines()]
    assert {"| strict by tag | colors |", "| base | .125 → .275 |"} <= set(lines)
    assert "| base | .500 → .500 | – | 0: .250, 1: .400, 2: .550 | – |" in lines
    assert "at revision 012345678, 012345678* (* with uncommitted changes)." in page
    assert "a backward pass is 1.250 of them" in page and "Machine: Cpu with 2 cores" in page
    assert blue() in colours(output / "made.png", 400)


def test_without_a_baseline_there_is_no_test(plot, results, tmp_path):
    for path in results.glob("base-*"):
        path.unlink()
    call(plot, "made", "--results", results.parent, "--output", tmp_path)
    page = (tmp_path / "made.md").read_text()
    assert len(re.findall(r"\| no results +\| – +\| – +\| – +\|", page)) == 3


def test_results_that_do_not_belong_together_are_refused(plot, results, tmp_path):
    path = results / "base-seed2.jsonl"
    path.write_text(path.read_text().replace('"changes": {}', '"changes": {"a": 1}'))
    with pytest.raises(ValueError) as stopped:
        call(plot, "made", "--results", results.parent, "--output", tmp_path)
    assert "the seeds of base differ" in str(stopped.value)
    with pytest.raises(ValueError) as stopped:
        call(plot, "nothing", "--results", results.parent, "--output", tmp_path)
    assert "has no results: run scripts/experiments.py nothing" in str(stopped.value)


def test_alarms_and_watched_metrics_are_shown(plot, results, tmp_path):
    # Epochs at which each alarm is on, by variant and seed.
    on = {
        ("base", 1): {"loss/kl": (2,)},
        ("better", 1): {"loss/kl": (1, 2), "eval/diversity": (2,)},
        ("better", 2): {"loss/kl": (2,), "eval/diversity": (2,)},
    }
    for path in results.glob("*.jsonl"):
        about, *rows = map(json.loads, path.read_text().splitlines())
        about["watched"] = ["reward/mean", "eval/shapes/strict"]
        if about["variant"] in ("base", "better"):
            epochs = on.get((about["variant"], about["seed"]), {})
            for row in rows:
                name = "eval/diversity" if "eval/total" in row else "loss/kl"
                row[f"monitor/alarm/{name}"] = int(row["epoch"] in epochs.get(name, ()))
        path.write_text("\n".join(map(json.dumps, [about, *rows])) + "\n")
    call(plot, "made", "--results", results.parent, "--output", tmp_path)
    page = (tmp_path / "made.md").read_text()
    assert "(made-watched.png)" in page
    for name, height in (("made-watched", 350), ("made", 500)):
        assert colours(tmp_path / f"{name}.png", height) >= {blue()}
    table = [
        re.split(r" *\| +", line.strip("| ")) for line in page.splitlines() if line[:2] == "| "
    ]
    table = table[[row[0] for row in table].index("first epochs of alarms") :]
    both = "loss/kl 1, loss/kl + eval/diversity 1"
    assert table == [
        ["first epochs of alarms", "loss/kl", "eval/diversity", "first of all"],
        ["base", "1 of 3: 2 (2 to 2)", "0 of 3", "loss/kl 1"],
        ["better", "2 of 4: 1.5 (1 to 2)", "2 of 4: 2 (2 to 2)", both],
        ["shifted", "–", "–", "–"],
        ["short", "–", "–", "–"],
    ]
    for path in results.glob("*.jsonl"):
        path.write_text(re.sub(r'("monitor/alarm/\S+"): 1', r"\1: 0", path.read_text()))
    call(plot, "made", "--results", results.parent, "--output", tmp_path)
    page = (tmp_path / "made.md").read_text()
    assert "No alarm of the monitor was on" in page and "first of all" not in page
