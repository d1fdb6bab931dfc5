"""Alarms for what a rising reward may hide: each evaluation is compared with the first.

Watched are all evaluated rewards and their components, the diversity of pictures, brightness,
saturation and edges (with ``monitor.pictures``); and in each epoch the distance to the reference
and the size of clean latents.  The limits are ``monitor.*`` of the configuration.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.algorithms import Algorithm
from diffusion_nft.results import Evaluation

# The reward whose score and components ``monitor.pictures`` watches.
PICTURES = "picture_statistics"
# Metrics of this start are 1 where what they name is beyond its limit, else 0.
ALARM = "monitor/alarm/"
# What an alarm multiplies the weight of the KL term by, under ``raise_kl``; and at most in all.
KL_FACTOR, MAX_KL_FACTOR = 2.0, 64.0


def is_picture_statistic(name: str) -> bool:
    """Of brightness and the like, neither more nor less is better."""
    return name.partition("/")[0] == PICTURES


class Alarm(RuntimeError):
    """An alarm that ends the run, after its state is saved (``monitor.action = "stop"``)."""


class Monitor:
    """Compares evaluations and epochs with the first of their kind, and acts on what it finds.

    ``algorithm.kl_weight`` is raised where that is the action; ``say`` prints a line once.
    """

    def __init__(self, config: ConfigDict, algorithm: Algorithm, say: Callable[[str], None]):
        self.limits = config.monitor
        self.algorithm, self.say = algorithm, say
        self._alarm = ""
        self._alarming = False  # the last epoch
        self._unheard: list[str] = []  # what lasts since an alarm of an epoch
        # What a resumed run goes on with.  "evaluation": name -> (mean, standard error) of the
        # first that has the name; "x0_rms": of the first epoch.
        self.state: dict[str, Any] = {"alarms": 0, "kl_factor": 1.0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a former ``state``."""
        self.state = dict(state)
        self.algorithm.kl_weight *= self.state["kl_factor"]

    def forget_evaluation(self) -> None:
        """The next evaluation is the first: former ones, of other settings, do not compare."""
        self.state.pop("evaluation", None)

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
        self._unheard = found if self._alarming else []
        lasting, self._alarming = self._alarming, bool(found)
        return self._act(checks, [] if lasting else found)

    def evaluation(self, evaluation: Evaluation) -> dict[str, float]:
        """Looks at an evaluation; returns ``monitor/*`` for the log."""
        means = evaluation.averages()["mean"]
        now = {name: (value["mean"], value["stderr"]) for name, value in means.items()}
        if not math.isnan(evaluation.diversity):
            now["diversity"] = (evaluation.diversity, None)
        first = self.state.setdefault("evaluation", {})
        for name, value in now.items():
            first.setdefault(name, value)
        checks = {}
        for name, (mean, error) in now.items():
            before, error_before = first[name]
            key = f"eval/{name}"
            if name == "diversity":
                checks[key] = self._narrowed(mean, before)
            elif is_picture_statistic(name):
                checks[key] = self._changed(key, mean, before)
            # A single prompt has no standard error.
            elif error is not None and error_before is not None:
                checks[key] = self._dropped(key, (mean, error), (before, error_before))
        return self._act(checks, [*self._unheard, *(text for text in checks.values() if text)])

    def _act(self, checks: Mapping[str, str], found: list[str]) -> dict[str, float]:
        """Alarms of ``found``; what is logged says of each check whether its limit is passed."""
        if self.limits.action == "off":
            return {}
        if found:
            self.state["alarms"] += 1
            self._alarm = f"alarm: {'; '.join(found)}"
            raised = ""
            if self.limits.action == "raise_kl":
                step = KL_FACTOR if self.state["kl_factor"] < MAX_KL_FACTOR else 1.0
                self.state["kl_factor"] *= step
                self.algorithm.kl_weight *= step
                raised = f"; the weight of the KL term is now {self.algorithm.kl_weight:g}"
            self.say(self._alarm + raised)
        sums = {f"monitor/{name}": self.state[name] for name in ("alarms", "kl_factor")}
        return sums | {f"{ALARM}{name}": float(bool(text)) for name, text in checks.items()}

    def progress(self) -> dict[str, int]:
        """What the progress bar shows: nothing, until there is an alarm."""
        return {"alarms": self.state["alarms"]} if self.state["alarms"] else {}

    def stop_if_alarmed(self) -> None:
        """Raises Alarm after an alarm, where ``monitor.action`` is ``stop``."""
        if self._alarm and self.limits.action == "stop":
            raise Alarm(f"{self._alarm} (monitor.action = 'stop')")

    def _dropped(self, name: str, now: tuple, first: tuple) -> str:
        """A score that fell by more standard errors of the difference than allowed; these are of
        independent evaluations, more than those of the same lines and noise.
        """
        error, drop = math.hypot(now[1], first[1]), first[0] - now[0]
        if drop <= self.limits.max_drop * error:
            return ""
        errors = f", {drop / error:.1f} SE" if error else ""
        return f"{name} fell from {first[0]:.4g} to {now[0]:.4g}{errors}"

    def _narrowed(self, now: float, first: float) -> str:
        if now < (1 - self.limits.max_diversity_drop) * first:
            return f"eval/diversity fell from {first:.4g} to {now:.4g}"
        return ""

    def _changed(self, name: str, now: float, first: float) -> str:
        if abs(now - first) <= self.limits.max_picture_change * abs(first):
            return ""
        return f"{name} went from {first:.4g} to {now:.4g}"
