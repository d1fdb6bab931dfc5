"""The HTML report, read by a parser and by a browser."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffusion_nft.reports.charts import ticks
from tests.scripts.in_process import call, script

report = script("report")
EVIL = "<script>alert(\"p\")</script> & 'x' </style>"
VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}
SHAPES = {"svg", "path", "circle", "rect"}


class Page(HTMLParser):
    """Text and elements of a page; checks that tags are nested."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.open, self.elements, self.texts = source, [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SHAPES
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def chart(self, title: str) -> dict:
        """The data of a chart."""
        charts = {str(a["aria-label"]).split(": ")[0]: a for a in self.all("svg") if len(a) > 4}
        return json.loads(charts[title]["data-chart"])


def epoch_row(epoch: int, **changes) -> dict:
    row = {"step": 2 * epoch, "epoch": epoch, "loss/policy": 3.0, "loss/kl": 0.01 * epoch}
    row |= {"optim/grad_norm": 0.1, "optim/learning_rate": 1e-3, "optim/old_policy_decay": 0.0}
    row |= {"optim/skipped_steps": 0, "reward/mean": 0.5 + 0.01 * epoch, "reward/std": 0.1}
    row |= {"reward/diversity": 0.2, "reward/frac_zero_std": 0.0, "time/sample": 6.0}
    row |= {"time/train": 4.0, "time/epoch": 10.0, "time/images_per_second": 19.2}
    return row | {"cost/forwards": 3000, "cost/backwards": 500} | changes


def add_evaluation(run, rows: list[dict], epoch: int, scores: list[float], stage: int = 0) -> None:
    """Four test lines, two of them of one prompt."""
    mean = sum(scores) / 4
    column = {"stage": stage} if stage else {}
    row = {"step": 2 * epoch, "epoch": epoch, **column, "eval/total": mean, "eval/shapes": mean}
    row |= {"eval/tag/colors/shapes": scores[0], "eval/tag/counting/shapes": scores[2]}
    rows.append(row | {"eval/diversity": None, "eval/num_samples": 4, "time/eval": 5.0})
    folder = run / "eval" / (f"stage-{stage}" if stage else "") / f"epoch-{epoch:06d}"
    folder.mkdir(parents=True)
    prompts = [EVIL, "two circles", "two circles", "a square"]
    lines = [
        {"sample_id": i, "prompt": prompt, "scores": {"total": score, "shapes": score}}
        for i, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
    ]
    (folder / "evaluation_results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    value = {"mean": mean, "stderr": 0.05, "count": 4}
    tags = {tag: {"shapes": {"mean": 0.5, "stderr": 0.02}} for tag in ("colors", "counting")}
    averages = {"num_samples": 4, "mean": {"total": value, "shapes": value}, "tags": tags}
    (folder / "average_scores.json").write_text(json.dumps(averages))


def make_run(path, *, seed: int = 1, epochs: int = 12, planned: int = 12, rows=None, **config):
    """A run directory with two evaluations, starts and images."""
    path.mkdir()
    flat = {"num_epochs": planned, "pretrained.model": "shapes", "dataset": "shapes"}
    flat |= {"reward_fn.shapes": 1.0, "seed": seed, "algorithm": "nft", "save_dir": str(path)}
    (path / "config.json").write_text(json.dumps(flat | config))
    start = {"time": "2026-01-01T00:00:00Z", "device": "cpu", "command": EVIL, "torch": "2.9"}
    (path / "environments.jsonl").write_text(json.dumps(start | {"git_revision": "ab" * 20}) + "\n")
    if rows is None:
        rows = []
        add_evaluation(path, rows, 0, [0.25, 0.5, 0.25, 0.0])
        rows += [epoch_row(epoch) for epoch in range(1, epochs + 1)]
        add_evaluation(path, rows, epochs, [1.0, 0.75, 0.5, 0.75])
    write_rows(path, rows)
    (path / "images").mkdir()
    for epoch in (4, 8, 10, 12):
        draw(path / "images" / f"train-{epoch:06d}.png")
    draw(path / "before_after.png")
    return path


def write_rows(path, rows: list[dict]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(path, width: int = 32, height: int = 32) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def made(tmp_path, *runs) -> Page:
    call(report, *runs, "--output", tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """The report on a finished run."""
    folder = tmp_path_factory.mktemp("page")
    return made(folder, make_run(folder / "run"))


def refused(tmp_path, *runs) -> str:
    with pytest.raises((ValueError, OSError)) as stopped:
        call(report, *runs, "--output", tmp_path / "report.html")
    message = str(stopped.value)
    assert "\n" not in message
    assert not (tmp_path / "report.html").exists()
    return message


def test_everything_from_a_run_is_escaped(tmp_path):
    page = made(tmp_path, make_run(tmp_path / "run", run_name=EVIL))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert "alert(" not in re.findall(r"<script>(.*?)</script>", page.source, re.S)[0]
    # As text: title, name, prompt, command, configuration.
    assert page.text.count(EVIL) >= 5


def test_the_page_needs_nothing_else(tmp_path):
    page = made(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=2))
    addresses = [
        attributes[name]
        for _, attributes in page.elements
        for name in ("src", "href", "srcset", "data", "action", "poster")
        if name in attributes
    ]
    assert len(addresses) > 10
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in page.source and "url(" not in page.source
    policy = page.all("meta")[1]["content"]
    script = re.findall(r"<script>(.*?)</script>", page.source, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy


def test_the_page_can_be_read_without_seeing_it(page):
    assert page.all("html") == [{"lang": "en"}] and "run" in page.text.split(" – ")[0]
    assert all(image["alt"] for image in page.all("img"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg["aria-label"]
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= targets


def test_headline_numbers_match_a_hand_computation(page):
    # Gains .75, .25, .25, .75, mean .5; residuals by prompt .25, -.5, .25: 3/2 of the sum of
    # squares .375, its root over 4 lines.
    error = (1.5 * 0.375) ** 0.5 / 4
    assert f"shapes 0.750 ± 0.050 from 0.250 ± 0.050 +0.50 ± {error:.2f}" in page.text
    assert page.text.count("0.750 ± 0.050") == 1, "the total is the only reward, and left out"
    assert "3 test prompts, 3 gained, 0 lost" in page.text
    assert f"{EVIL} 1 0.250 1.000 +0.750" in page.text
    assert "two circles 2 0.375 0.625 +0.250" in page.text
    assert "Epochs 12 of 12" in page.text and "finished" in page.text
    assert "Sample 72 s (60%)" in page.text and "Train 48 s (40%)" in page.text
    assert "Forward passes (cost/forwards) 36,000" in page.text
    assert "2026-01-01T00:00:00Z cpu" in page.text and "abababab" in page.text


def test_curves_hold_the_logged_values(page):
    (curve,) = page.chart("reward/mean")["curves"]
    assert curve["points"] == [[e, pytest.approx(0.5 + 0.01 * e), 0] for e in range(1, 13)]
    (curve,) = page.chart("eval/shapes")["curves"]
    assert curve["points"] == [[0, 0.25, 0.05], [12, 0.75, 0.05]]
    titles = [str(a["aria-label"]).split(":")[0] for a in page.all("svg") if "data-chart" in a]
    for key in ("loss/policy", "loss/kl", "optim/grad_norm", "reward/diversity", "time/epoch"):
        assert titles.count(key) == 1


def test_three_training_grids_and_the_bars_of_tags_are_there(page):
    assert [epoch for epoch in (4, 8, 10, 12) if f" Epoch {epoch} " in page.text] == [4, 10, 12]
    assert len(page.all("img")) == 4
    (bars,) = [a["aria-label"] for a in page.all("svg") if " by tag: " in a.get("aria-label", "")]
    assert bars == (
        "eval/shapes by tag: colors: before 0.250, after 1.000; counting: before 0.250, after 0.500"
    )


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", rows=[])
    for path in [*run.rglob("*.png"), run / "metrics.jsonl", run / "environments.jsonl"]:
        path.unlink()
    page = made(tmp_path, run)
    for sentence in (
        "No evaluation yet.",
        "No epoch is finished yet.",
        "There is no evaluation by tag.",
        "There are no images of before and after",
        "No two evaluations of the same lines",
        "No images of training samples were saved.",
        "The environment was not recorded.",
        "Not finished: 0 of 12 epochs.",
    ):
        assert sentence in page.text
    assert not page.all("img")


def test_a_run_that_is_not_finished(tmp_path):
    run = make_run(tmp_path / "run", epochs=5, planned=1200)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "epo')  # killed while it wrote
    page = made(tmp_path, run)
    assert "5 of 1,200" in page.text and "not finished" in page.text


def test_stages_are_separate(tmp_path):
    rows, stages = [], {"stages.1.num_epochs": 4, "stages.2.num_epochs": 6}
    stages |= {"stages.2.dataset": "other", "stages.2.reward_fn.ocr": 0.5}
    run = make_run(
        tmp_path / "run", rows=[], **stages, **{"eval.held_out_rewards": ["shapes", "ocr"]}
    )
    add_evaluation(run, rows, 0, [0.0, 0.0, 0.0, 0.0], stage=1)
    rows += [epoch_row(epoch, stage=1) for epoch in range(1, 5)]
    add_evaluation(run, rows, 4, [0.5, 0.5, 0.5, 0.5], stage=1)
    add_evaluation(run, rows, 4, [0.25, 0.25, 0.25, 0.25], stage=2)
    rows += [epoch_row(epoch, stage=2) for epoch in range(5, 9)]
    write_rows(run, rows)
    (run / "before_after.png").rename(run / "before_after_stage1.png")
    page = made(tmp_path, run)
    assert "Epochs 8 of 10" in page.text
    assert "shapes → other" in page.text and "shapes → 0.5 × ocr" in page.text
    assert "Stage 1 Test set, epoch 0 → epoch 4." in page.text
    assert "Stage 2 Test set at epoch 4, the only evaluation so far." in page.text
    assert "shapes held out" in page.text, "the second stage only evaluates it"
    points = page.chart("eval/shapes")["curves"][0]["points"]
    assert points == [[0, 0.0, 0.05], [4, 0.5, 0.05], [4, 0.25, 0.05]]
    # The curve has a gap between stages.
    assert page.source.count('class="mark"') >= 1
    assert max(str(a.get("d", "")).count("M") for a in page.all("path")) == 2


def test_a_comparison_names_all_and_shows_what_differs(tmp_path):
    first = make_run(tmp_path / "first", seed=1, **{"nft.beta": 1.0, "log.num_images": 4})
    second = make_run(tmp_path / "second", seed=2, epochs=9, **{"log.num_images": 8})
    third = make_run(tmp_path / "third", seed=2, **{"nft.beta": 0.1, "log.num_images": 8})
    page = made(tmp_path, first, second, third)
    heading = re.findall(r"<h1>.*?</h1>", page.source, re.S)[0]
    assert all(name in heading for name in ("first", "second", "third"))
    assert "nft.beta 1.0 – 0.1 yes seed 1 2 2 yes log.num_images 4 8 8 no Results" in page.text
    assert "eval/shapes 0.250 → 0.750 ± 0.050 0.250 → 0.750 ± 0.050 0.250 → 0.750" in page.text
    assert [c["name"] for c in page.chart("loss/kl")["curves"]] == ["first", "second", "third"]
    for title, curve, end in (
        ("eval/total by training time, s", 1, 90),
        ("eval/total by forward passes (without backward passes)", 0, 36000),
    ):
        points = page.chart(title)["curves"][curve]["points"]
        assert [point[:2] for point in points] == [[0, 0.25], [end, 0.75]]
    assert page.text.index("What differs") < page.text.index("Results First")
    assert "not comparable" not in page.text


def test_runs_with_equal_names_are_named_by_their_paths(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    runs = [make_run(tmp_path / folder / "run") for folder in ("a", "b")]
    page = made(tmp_path, *runs)
    assert [c["name"] for c in page.chart("loss/kl")["curves"]] == [str(run) for run in runs]
    assert "All keys have the same values." in page.text


def test_incomparable_runs_have_warnings(tmp_path):
    other = {"dataset": "other", "reward_fn.shapes": 0.5}
    page = made(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", **other))
    assert "different test lines: eval/* is not comparable" in page.text
    assert "reward/mean and eval/total are not comparable" in page.text


def test_warnings_and_notes(tmp_path):
    run = make_run(tmp_path / "run")
    rows = []
    (run / "eval").rename(run / "gone")
    add_evaluation(run, rows, 0, [0.5, 0.5, 0.5, 0.5])
    rows += [epoch_row(epoch) for epoch in range(1, 6)]
    lost = {"optim/skipped_steps": 3, "reward/frac_zero_std": 0.75, "reward/diversity": 0.1}
    rows += [epoch_row(epoch, **lost, **{"loss/policy": None}) for epoch in range(6, 12)]
    add_evaluation(run, rows, 11, [0.25, 0.0, 0.0, 0.25])
    write_rows(run, rows)
    start = {"device": "cpu", "git_revision": "cd" * 20, "git_dirty": True}
    with (run / "environments.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    page = made(tmp_path, run)
    for sentence in (
        "3 optimizer steps were skipped for a non-finite gradient, the first by epoch 6.",
        "loss/policy was not finite in 6 epochs, first 6.",
        "scored the same for 75% of the prompts",
        "reward/diversity fell from 0.200 to 0.100",
        "eval/shapes decreased in training: -0.375 ± 0.094.",
        "the best eval/total, 0.500, was at epoch 0, not at the end (0.125).",
        "Not finished: 11 of 12 epochs.",
        "Started 2 times.",
        f"git_revision changed between starts: {'ab' * 20} → {'cd' * 20}.",
        "uncommitted changes",
    ):
        assert sentence in page.text
    assert "Warning" not in made(tmp_path, make_run(tmp_path / "sound")).text


def test_invalid_run_directories_are_refused_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    assert "is not a run directory: it has no config.json" in refused(tmp_path, empty)
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    assert "is not the configuration of a run: no" in refused(tmp_path, empty)
    (empty / "config.json").write_text("{")
    assert "config.json is damaged: not JSON" in refused(tmp_path, empty)
    run = make_run(tmp_path / "run")
    assert "given twice" in refused(tmp_path, run, tmp_path / "empty" / ".." / "run")
    (run / "before_after.png").write_bytes(b"no image")
    assert "cannot identify image" in refused(tmp_path, run)
    (run / "before_after.png").unlink()
    (run / "metrics.jsonl").write_text("[]\n")
    assert "metrics.jsonl:1 is not a JSON object" in refused(tmp_path, run)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file is not a folder"):
        call(report, make_run(tmp_path / "b"), "--output", tmp_path / "file" / "report.html")


def test_a_report_is_in_its_run_and_a_comparison_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    call(report, one)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'one' / 'report.html'}: ")
    call(report, one, two)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'report.html'}: ")
    assert (one / "report.html").is_file() and (tmp_path / "report.html").is_file()
    with pytest.raises(ValueError):
        call(report, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_captions_that_a_grid_could_not_show_are_in_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    draw(run / "before_after.png", 17, 12)
    assert "Prompts in full" not in made(tmp_path, run).text
    (run / "before_after.txt").write_text("1: a <b>\n2: 一只猫\n", encoding="utf-8")
    text = made(tmp_path, run).text
    assert "Prompts in full" in text and "1: a <b>" in text and "2: 一只猫" in text


def test_large_images_are_made_smaller(tmp_path):
    run = make_run(tmp_path / "run")
    draw(run / "before_after.png", 1700, 120)
    page = made(tmp_path, run)
    large, *others = page.all("img")
    assert large["src"].startswith("data:image/webp;base64,") and large["width"] == "1600"
    assert len(page.source) < (run / "before_after.png").stat().st_size
    draw(run / "images" / "train-000012.png", 12, 20_000)
    assert made(tmp_path, run).all("img")[-1]["height"] == "16000"
    assert all(image["src"].startswith("data:image/png;base64,") for image in others)


def test_long_curves_are_thinned_to_means(tmp_path):
    rows = [epoch_row(epoch, **{"reward/mean": float(epoch)}) for epoch in range(1, 1001)]
    page = made(tmp_path, make_run(tmp_path / "run", rows=rows, planned=1000))
    points = page.chart("reward/mean")["curves"][0]["points"]
    assert len(points) == 334 and points[0] == [2, 2, 0] and points[-1] == [1000, 1000, 0]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.05, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (0.0, 80.0, "0 20 40 60 80"),
        (-0.0026, -0.0021, "-0.0026 -0.0025 -0.0024 -0.0023 -0.0022 -0.0021"),
        (0.0, 2e6, "0 5e+05 1e+06 1.5e+06 2e+06"),
    ],
)
def test_axes_have_round_numbers(low, high, expected):
    assert [text for _, text in ticks(low, high, 5)] == expected.split()


@pytest.fixture
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        if path is None:
            pytest.skip("needs a Chromium, such as Debian's package chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_errors_or_requests(tmp_path, browser, width):
    long = make_run(tmp_path / "second-with-a-rather-long-name", seed=2, **{"nft.beta": 0.1})
    made(tmp_path, make_run(tmp_path / "first"), long)
    shots = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        chart = page.locator("svg[data-chart]").first
        chart.hover()
        tip = page.locator("#tip")
        assert tip.is_visible() and "first: " in tip.inner_text()
        chart.focus()
        page.keyboard.press("ArrowLeft")
        assert "epoch 0" in tip.inner_text() and "first: 0.25 ± 0.05" in tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        shots[scheme] = tmp_path / f"{scheme}.png"
        page.screenshot(path=shots[scheme], full_page=True)
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        context.close()
    means = {scheme: np.asarray(Image.open(path)).mean() for scheme, path in shots.items()}
    assert means["light"] > 200 and means["dark"] < 90


def test_alarms_are_warnings(tmp_path):
    first = {"monitor/alarms": 1, "monitor/kl_factor": 2.0}
    first |= {"monitor/alarm/loss/kl": 1, "monitor/alarm/reward/x0_rms": 0}
    rows = [epoch_row(1), epoch_row(2, **first)]
    rows += [epoch_row(3, **{"monitor/alarms": 2, "monitor/kl_factor": 4.0})]
    page = made(tmp_path, make_run(tmp_path / "run", rows=rows))
    assert (
        "2 alarm(s) of the monitor, the first, of loss/kl, in epoch 2; the weight of the KL term "
        "is multiplied by 4" in page.text
    )
