"""Alarms for damage to the images that a rising reward may hide.

Each evaluated reward and component, over all test lines and per tag, is compared with its best
value so far, as a loss often undoes an earlier gain, and in a single tag.  Diversity, and
brightness, saturation and edges (``monitor.image_statistics``), are compared with the first
evaluation, the RMS of clean latents with the first epoch; the distance to the reference has a fixed
limit.  The limits are ``monitor.*`` of the configuration.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.algorithms import Algorithm
from diffusion_nft.evaluation.results import Evaluation
from diffusion_nft.rewards import IMAGE_STATISTICS

# Prefix of metrics that are 1 if the named metric is beyond its limit, else 0.
ALARM = "monitor/alarm/"
# Tags with fewer test lines are not compared, as their standard error is unreliable.
MIN_LINES_OF_TAG = 20
# Maximum number of metrics that an alarm's line names.
MAX_NAMED = 4
# Factor by which an alarm raises the weight of the KL term (action ``raise_kl``), and its limit.
KL_FACTOR, MAX_KL_FACTOR = 2.0, 64.0


def is_image_statistic(name: str) -> bool:
    """True for brightness, saturation and edges, which have no better direction."""
    return name.partition("/")[0] == IMAGE_STATISTICS


class Alarm(RuntimeError):
    """Ends the run after its state is saved (``monitor.action = "stop"``)."""


class Monitor:
    """Compares evaluations and epochs with former ones, and acts on alarms (``monitor.action``),
    which may scale the KL term of ``algorithm``.
    """

    def __init__(self, config: ConfigDict, algorithm: Algorithm, log: Callable[[str, int], None]):
        self.limits = config.monitor
        self.algorithm, self.log = algorithm, log
        self._alarm = ""
        # Saved with the run, with two more keys: "evaluation", name -> (mean, standard error) of
        # the best evaluation for a score, otherwise of the first; "x0_rms" of the first epoch.
        # "alarming": the last epoch was beyond a limit; "unheard": texts of limits still exceeded
        # after an epoch's alarm, which the next evaluation repeats.
        self.state: dict[str, Any] = {
            "alarms": 0,
            "kl_factor": 1.0,
            "alarming": False,
            "unheard": [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state |= state
        self.algorithm.scale_kl(self.state["kl_factor"])

    def forget(self, baseline: str) -> None:
        """Makes the next ``"evaluation"``, or epoch (``"x0_rms"``), the first to compare with."""
        self.state.pop(baseline, None)

    def epoch(self, values: Mapping[str, float]) -> dict[str, float]:
        """Checks the metrics of an epoch; returns ``monitor/*`` for the log.

        A limit exceeded for several epochs is one alarm, and one more at each evaluation.
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
        """Checks an evaluation; returns ``monitor/*`` for the log.

        All scores of a tag are a single check, as they are closely related.
        """
        former = self.state.setdefault("evaluation", {})
        checks: dict[str, str] = {}
        for name, value in _watched(evaluation).items():
            before = former.setdefault(name, value)
            key = f"eval/{name}"
            if name == "diversity":
                narrow = value[0] < (1 - self.limits.max_diversity_drop) * before[0]
                text = f"{key} fell from {before[0]:.4g} to {value[0]:.4g}"
                checks[key] = text if narrow else ""
            elif is_image_statistic(name):
                checks[key] = self._changed(key, value[0], before[0])
            else:
                text = self._dropped(key, value, before)
                if name.startswith("tag/"):
                    key = "/".join(key.split("/")[:3])
                checks[key] = checks.get(key) or text
                if value[0] > before[0]:
                    former[name] = value
        return self._act(checks, self.state["unheard"] + [text for text in checks.values() if text])

    def _act(self, checks: Mapping[str, str], found: list[str]) -> dict[str, float]:
        """Gives an alarm of the texts ``found``, if any; returns the metrics of all ``checks``."""
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
            self.log(self._alarm + raised, logging.WARNING)
        sums = {f"monitor/{name}": self.state[name] for name in ("alarms", "kl_factor")}
        return sums | {f"{ALARM}{name}": float(bool(text)) for name, text in checks.items()}

    def progress(self) -> dict[str, int]:
        """Values for the progress bar; none before the first alarm."""
        return {"alarms": self.state["alarms"]} if self.state["alarms"] else {}

    def stop_if_alarmed(self) -> None:
        if self._alarm and self.limits.action == "stop":
            raise Alarm(f"{self._alarm} (monitor.action = 'stop')")

    def _dropped(self, name: str, now: tuple, best: tuple) -> str:
        """Text for a score that fell by more than ``max_drop`` standard errors, else "".

        The errors are treated as independent, which overestimates the difference's, as both
        evaluations share lines and noise.
        """
        error, drop = math.hypot(now[1], best[1]), best[0] - now[0]
        if drop <= self.limits.max_drop * error:
            return ""
        errors = f", {drop / error:.1f} SE" if error else ""
        return f"{name} fell from {best[0]:.4g} to {now[0]:.4g}{errors}"

    def _changed(self, name: str, now: float, first: float) -> str:
        if abs(now - first) <= self.limits.max_image_change * abs(first):
            return ""
        return f"{name} went from {first:.4g} to {now:.4g}"


def _watched(evaluation: Evaluation) -> dict[str, tuple[float, float | None]]:
    """NAME -> (mean, standard error) of all ``eval/NAME`` except scores of a single prompt, which
    have no error.
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
