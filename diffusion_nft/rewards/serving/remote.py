"""Client of reward servers (server.py)."""

import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import tenacity
import torch
from torch import Tensor

from diffusion_nft.data.prompts import shard
from diffusion_nft.rewards import REWARD_SERVER_TIMEOUT, RewardOutput
from diffusion_nft.rewards.serving.protocol import (
    PROTOCOL,
    TOKEN_VARIABLE,
    Health,
    ScoringAnswer,
    ScoringRequest,
    encode_images,
    read,
    shared_token,
)

# Seconds to accept a connection, and to answer /health.
CONNECT_TIMEOUT_S = 10.0
# No further attempt starts after this multiple of an attempt's time-out.
RETRY_WINDOW_FACTOR = 2
# Statuses that another attempt may not have.
RETRYABLE_STATUSES = (429, 500, 502, 503, 504)
# Characters of an answer that an error quotes.
MAX_QUOTED = 500

T = TypeVar("T")

# httpx logs every request at level INFO, which breaks progress bars.
logging.getLogger("httpx").setLevel(logging.WARNING)


class _TryAgain(Exception):
    """An attempt failed for a temporary reason; issues a warning."""

    def __init__(self, message: str):
        super().__init__(message)
        warnings.warn(message, stacklevel=1)


class RemoteReward:
    """The reward ``name``, served at ``addresses`` such as "http://host:8000".

    A batch is split into near-equal parts, one per address, which are scored in parallel.  A part
    is sent to all addresses in turn until one answers, in up to ``rounds`` rounds with a pause of
    ``pause`` seconds that doubles: lost connections, time-outs, 429, 5xx and malformed answers are
    retried until 2 ``timeout`` have passed.  ``timeout``: seconds per attempt.  The environment
    variable REWARD_SERVER_TOKEN holds the token of the servers.

    Raises ConnectionError if no attempt succeeded, PermissionError for a wrong token, and
    ValueError for a refused request.  Building it raises ValueError if a server has another reward
    or protocol, or other options than the first.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        *,
        timeout: float = REWARD_SERVER_TIMEOUT,
        rounds: int = 5,
        pause: float = 1.0,
    ):
        self.name, self.addresses = name, tuple(addresses)
        self.timeout, self.rounds, self.pause = timeout, rounds, pause
        token = shared_token()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
            # Proxies of the environment do not apply to reward servers.
            trust_env=False,
        )
        options = [self._check_health(address) for address in addresses]
        for address, found in zip(addresses, options, strict=True):
            if found != options[0]:
                raise ValueError(
                    f"reward {name!r} has the options {found} at {address}, but {options[0]} at "
                    f"{addresses[0]}"
                )
        self.options = options[0]  # at the start of the run

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        if not prompts:
            return RewardOutput(torch.zeros(0, dtype=torch.float64))
        encoded = encode_images(images)
        servers = len(self.addresses)
        parts = [part for i in range(servers) if (part := shard(len(encoded), i, servers))]

        def score(part: range, first: int) -> RewardOutput:
            rows = slice(part.start, part.stop)
            return self._ask(
                self.addresses[first:] + self.addresses[:first],
                "/score",
                ScoringRequest.model_construct(
                    protocol=PROTOCOL,
                    reward=self.name,
                    options=self.options,
                    images=encoded[rows],
                    prompts=prompts[rows],
                    metadata=metadata[rows],
                ),
                lambda answer: read(ScoringAnswer, answer).output(len(part)),
            )

        with ThreadPoolExecutor(len(parts)) as pool:
            outputs = list(pool.map(score, parts, range(len(parts))))
        names = {frozenset(output.components) for output in outputs}
        if len(names) > 1:
            raise ValueError(f"the servers differ in their components: {[*map(sorted, names)]}")
        return RewardOutput(
            torch.cat([output.scores for output in outputs]),
            {key: torch.cat([output.components[key] for output in outputs]) for key in names.pop()},
            {
                part.start + row: reason
                for part, output in zip(parts, outputs, strict=True)
                for row, reason in output.reasons.items()
            },
        )

    def _ask(
        self,
        addresses: Sequence[str],
        path: str,
        body: ScoringRequest | None,
        parse: Callable[[bytes], T],
    ) -> T:
        """Parses the first valid answer; for the errors see the class."""
        turn = itertools.cycle(addresses)

        def pause(state: tenacity.RetryCallState) -> float:
            """Seconds after an attempt: 0 until every address has had a turn."""
            rounds, rest = divmod(state.attempt_number, len(addresses))
            return 0 if rest else self.pause * 2 ** (rounds - 1)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            wait=pause,
            # Bounded in time, so that stalled servers do not exceed the other ranks' time-out.
            stop=tenacity.stop_after_attempt(self.rounds * len(addresses))
            | tenacity.stop_before_delay(RETRY_WINDOW_FACTOR * self.timeout),
        )
        try:
            return retrying(lambda: self._try(next(turn), path, body, parse))
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise ConnectionError(
                f"no answer from the servers of reward {self.name!r} at {', '.join(addresses)} in "
                f"{last.attempt_number} attempts; the last error: {last.exception()}"
            ) from last.exception()

    def _try(
        self, address: str, path: str, body: ScoringRequest | None, parse: Callable[[bytes], T]
    ) -> T:
        where = f"reward {self.name!r} at {address}"
        try:
            if body is None:
                response = self._client.get(address + path, timeout=CONNECT_TIMEOUT_S)
            else:
                response = self._client.post(address + path, content=body.model_dump_json())
        except httpx.RequestError as error:
            raise _TryAgain(f"{where}: {type(error).__name__}: {error}") from error
        if response.status_code == 200:
            try:
                return parse(response.content)
            except ValueError as error:
                raise _TryAgain(f"{where} sent a malformed answer: {error}") from error
        message = f"{where} answered {response.status_code}: {response.text[:MAX_QUOTED]}"
        if response.status_code in RETRYABLE_STATUSES:
            raise _TryAgain(message)
        if response.status_code == 401:
            raise PermissionError(f"{message}; set it in the environment variable {TOKEN_VARIABLE}")
        raise ValueError(message)

    def _check_health(self, address: str) -> dict[str, Any]:
        """Checks protocol and reward at ``address``; returns the reward's options."""
        health = self._ask((address,), "/health", None, lambda answer: read(Health, answer))
        if health.protocol != PROTOCOL:
            raise ValueError(
                f"the server at {address} has protocol {health.protocol}, this run has {PROTOCOL}: "
                "install the same version of the project for both"
            )
        if health.reward != self.name:
            raise ValueError(f"{address} serves reward {health.reward!r}, not {self.name!r}")
        return health.options
