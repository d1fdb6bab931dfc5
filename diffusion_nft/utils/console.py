"""What a run tells its user on stderr: log lines with time and rank, and progress."""

import logging
import os
import sys
import time
from typing import Self

from tqdm import tqdm

LOGGER = logging.getLogger("diffusion_nft")
# Least seconds between the lines of an outer loop, and of one inside it, without a terminal.
OUTER_INTERVAL_S, INNER_INTERVAL_S = 10.0, 60.0
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class _Console(logging.Handler):
    """Writes to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Read here, as forked ranks get their variables after the import.
        many = os.environ.get("WORLD_SIZE", "1") != "1"
        record.rank = f" rank {os.environ.get('RANK', 0)}" if many else ""
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up() -> None:
    handler = _Console()
    form = "%(asctime)s%(rank)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%d %H:%M:%S"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # absl's handler on the root logger would repeat each line


_set_up()


class Progress:
    """A bar if stderr is a terminal, else a log line now and then; nothing unless ``enabled``.

    ``outer``: the bar stays on the screen, and the last pass has a line in any case.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, outer: bool = False, enabled: bool = True
    ):
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            leave=outer,
            dynamic_ncols=True,
            disable=None if enabled else True,  # None: unless stderr is a terminal
        )
        self._what, self._total, self._initial, self._done = what, total, done, done
        self._logs, self._outer = enabled and self._bar.disable, outer
        self._started = self._logged = time.monotonic()

    def update(self, number: int = 1, **values: object) -> None:
        """Counts ``number`` more as done; shows ``values`` behind the count."""
        self._done += number
        postfix = ", ".join(f"{name}={value}" for name, value in values.items())
        if postfix:
            self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(number)
        now = time.monotonic()
        due = now - self._logged >= (OUTER_INTERVAL_S if self._outer else INNER_INTERVAL_S)
        if self._logs and (due or (self._outer and self._done >= self._total)):
            self._logged = now
            line = tqdm.format_meter(
                self._done,
                self._total,
                now - self._started,
                prefix=self._what,
                bar_format=LINE,
                postfix=postfix,
                initial=self._initial,
            )
            LOGGER.info(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.close()
