"""Alarms for what a rising reward may hide.

All evaluated rewards and their components are compared with the best that they have been, over all
lines and by tag: what is lost is often what was gained before, and in one tag only.  The diversity
of images, brightness, saturation and edges (with ``monitor.image_statistics``) are compared with
the first evaluation, the size of clean latents with the first epoch; the distance to the reference
has a limit of its own.  The limits are ``monitor.*`` of the configuration.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.algorithms import Algorithm
from diffusion_nft.evaluation.results import Evaluation
from diffusion_nft.rewards import IMAGE_STATISTICS

# Metrics of this start are 1 where what they name is beyond its limit, else 0.
ALARM = "monitor/alarm/"
# Fewer lines of a tag than this say too little about their spread.
MIN_LINES_OF_TAG = 20
# Of more than this an alarm's line names no further ones.
MAX_NAMED = 4
# What an alarm multiplies the weight of the KL term by, under ``raise_kl``; and at most in all.
KL_FACTOR, MAX_KL_FACTOR = 2.0, 64.0


def is_image_statistic(name: str) -> bool:
    """Of brightness and the like, neither more nor less is better."""
    return name.partition("/")[0] == IMAGE_STATISTICS


class Alarm(RuntimeError):
    """An alarm that ends the run, after its state is saved (``monitor.action = "stop"``)."""


class Monitor:
    """Compares evaluations and epochs with former ones, and acts on what it finds.

    Where that is the action, an alarm scales ``algorithm``'s KL term; ``print_once`` prints a line
    once.
    """

    def __init__(self, config: ConfigDict, algorithm: Algorithm, print_once: Callable[[str], None]):
        self.limits = config.monitor
        self.algorithm, self.print_once = algorithm, print_once
        self._alarm = ""
        # What a resumed run goes on with.  "evaluation": name -> (mean, standard error), of a score
        # the best so far, else the first; "x0_rms": of the first epoch; "alarming": whether the
        # last epoch was; "unheard": what lasts since an alarm of an epoch.
        self.state: dict[str, Any] = {
            "alarms": 0,
            "kl_factor": 1.0,
            "alarming": False,
            "unheard": [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a former ``state``."""
        self.state |= state
        self.algorithm.scale_kl(self.state["kl_factor"])

    def forget_evaluation(self) -> None:
        """The next evaluation is the first: former ones, of other settings, do not compare."""
        self.state.pop("evaluation", None)

    def forget_epoch(self) -> None:
        """The next epoch is the first: former ones, of other prompts, do not compare."""
        self.state.pop("x0_rms", None)

    def epoch(self, values: Mapping[str, float]) -> dict[str, float]:
        """Looks at the metrics of an epoch; returns ``monitor/*`` for the log.

        What lasts from epoch to epoch is one alarm, and another one at each evaluation.
        """
        checks = {}
        if most := self.limits.max_kl:
            kl = values.get("loss/kl", 0.0)
            text = f"loss/kl, the distance to the reference, is {kl:.4g} (max_kl {most:g})"
            checks["loss/kl"] = text if kl > most else ""
        rms = values["reward/x0_rms"]
        first = self.state.setdefault("x0_rms", rms)
        checks["reward/x0_rms"] = self._changed("reward/x0_rms", rms, first)
        found = [text for text in checks.values() if text]
        lasting = self.state["alarming"]
        alarming = bool(found) and self.limits.action != "off"
        self.state |= {"alarming": alarming, "unheard": found if lasting else []}
        return self._act(checks, [] if lasting else found)

    def evaluation(self, evaluation: Evaluation) -> dict[str, float]:
        """Looks at an evaluation; returns ``monitor/*`` for the log.  The scores of a tag are one
        check, as they often say the same.
        """
        former = self.state.setdefault("evaluation", {})
        checks: dict[str, str] = {}
        for name, value in _watched(evaluation).items():
            before = former.setdefault(name, value)
            key = f"eval/{name}"
            if name == "diversity":
                checks[key] = self._narrowed(value[0], before[0])
            elif is_image_statistic(name):
                checks[key] = self._changed(key, value[0], before[0])
            else:
                text = self._dropped(key, value, before)
                if name.startswith("tag/"):
                    key = "/".join(key.split("/")[:3])
                checks[key] = checks.get(key) or text
                if value[0] > before[0]:
                    former[name] = value
        return self._act(
            checks, [*self.state["unheard"], *(text for text in checks.values() if text)]
        )

    def _act(self, checks: Mapping[str, str], found: list[str]) -> dict[str, float]:
        """Alarms of ``found``; what is logged says of each check whether its limit is passed."""
        if self.limits.action == "off":
            return {}
        if found:
            self.state["alarms"] += 1
            if len(found) > MAX_NAMED:
                found = [*found[:MAX_NAMED], f"{len(found) - MAX_NAMED} more"]
            self._alarm = f"alarm: {'; '.join(found)}"
            raised = ""
            if self.limits.action == "raise_kl":
                step = KL_FACTOR if self.state["kl_factor"] < MAX_KL_FACTOR else 1.0
                self.state["kl_factor"] *= step
                self.algorithm.scale_kl(step)
                raised = f"; the weight of the KL term is now {self.algorithm.kl_weight:g}"
            self.print_once(self._alarm + raised)
        sums = {f"monitor/{name}": self.state[name] for name in ("alarms", "kl_factor")}
        return sums | {f"{ALARM}{name}": float(bool(text)) for name, text in checks.items()}

    def progress(self) -> dict[str, int]:
        """What the progress bar shows: nothing, until there is an alarm."""
        return {"alarms": self.state["alarms"]} if self.state["alarms"] else {}

    def stop_if_alarmed(self) -> None:
        """Raises Alarm after an alarm, where ``monitor.action`` is ``stop``."""
        if self._alarm and self.limits.action == "stop":
            raise Alarm(f"{self._alarm} (monitor.action = 'stop')")

    def _dropped(self, name: str, now: tuple, best: tuple) -> str:
        """A score that fell by more standard errors of the difference than allowed; these are of
        independent evaluations, more than those of the same lines and noise.
        """
        error, drop = math.hypot(now[1], best[1]), best[0] - now[0]
        if drop <= self.limits.max_drop * error:
            return ""
        errors = f", {drop / error:.1f} SE" if error else ""
        return f"{name} fell from {best[0]:.4g} to {now[0]:.4g}{errors}"

    def _narrowed(self, now: float, first: float) -> str:
        if now < (1 - self.limits.max_diversity_drop) * first:
            return f"eval/diversity fell from {first:.4g} to {now:.4g}"
        return ""

    def _changed(self, name: str, now: float, first: float) -> str:
        if abs(now - first) <= self.limits.max_image_change * abs(first):
            return ""
        return f"{name} went from {first:.4g} to {now:.4g}"


def _watched(evaluation: Evaluation) -> dict[str, tuple[float, float | None]]:
    """(mean, standard error) of what ``eval/NAME`` logs, by name.

    Scores have an error: without one, of a single prompt, nothing can be said of a fall.
    """
    summary = evaluation.averages()
    means = dict(summary["mean"])
    for tag, scores in summary.get("tags", {}).items():
        means |= {
            f"tag/{tag}/{name}": value
            for name, value in scores.items()
            if value["count"] >= MIN_LINES_OF_TAG
            and name != "total"
            and not is_image_statistic(name)
        }
    watched = {
        name: (value["mean"], value["stderr"])
        for name, value in means.items()
        if value["stderr"] is not None or is_image_statistic(name)
    }
    if not math.isnan(evaluation.diversity):
        watched["diversity"] = (evaluation.diversity, None)
    return watched
