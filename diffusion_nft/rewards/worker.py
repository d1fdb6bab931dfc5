"""Background scoring: rewards run in a thread while the next images are sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from diffusion_nft.distributed.preemption import Preempted, requested
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.rewards.combine import MAX_NAMED, RewardError, Scores, UnscoredError

# Batches that may be queued.
QUEUE_LENGTH = 4
# Seconds between checks for a stop request while waiting for scores.
POLL_S = 0.2


class ScoringWorker:
    """A thread with a bounded queue that scores images while the next ones are sampled.

    On a GPU it has its own stream, so that scoring and sampling overlap.  ``scored`` is called in
    the thread with the number of images of each finished call.
    """

    def __init__(self, device: torch.device, scored: Callable[[int], object] = lambda _: None):
        self._device, self._scored = device, scored
        self._pool = ThreadPoolExecutor(1, initializer=_bind, initargs=(device,))
        self._pending: list[Future[Any]] = []

    def submit(self, score: Callable[..., Scores], images: Images, *arguments: Any) -> bool:
        """Queues ``score(images, *arguments)``; blocks while QUEUE_LENGTH calls are unfinished.

        Returns False if an earlier call has failed or the run was asked to stop.
        """
        if len(self._pending) >= QUEUE_LENGTH:
            self._wait([self._pending[-QUEUE_LENGTH]])
        if requested():
            return False
        drawn = None
        if self._device.type == "cuda":
            drawn = torch.cuda.current_stream(self._device).record_event()
        count = len(images)  # the callback would keep the images in memory
        future = self._pool.submit(_after, drawn, score, images, *arguments)
        future.add_done_callback(lambda _: self._scored(count))
        self._pending.append(future)
        return not any(future.done() and future.exception() for future in self._pending)

    def results(self) -> list[Scores]:
        """Waits for all scores, in order of submission.

        Raises the error of the first call that failed, or Preempted as soon as the run is asked to
        stop.
        """
        self._wait(self._pending)
        if requested():
            raise Preempted
        return [future.result() for future in self._pending]

    def _wait(self, futures: list[Future[Any]]) -> None:
        """Waits until all ``futures`` are done or the run was asked to stop."""
        while not requested() and wait(futures, timeout=POLL_S).not_done:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        # A stop request leaves seconds, but a reward may take minutes.
        self._pool.shutdown(wait=not requested(), cancel_futures=True)


@cache
def _scoring_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all scoring on ``device``: the allocator caches memory per stream."""
    return torch.cuda.Stream(device)


def _bind(device: torch.device) -> None:
    """Sets the CUDA device and stream of the worker's thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(_scoring_stream(device))


def _after(
    event: torch.Event | None, score: Callable[..., Scores], images: Images, *arguments: Any
) -> Scores:
    """Calls ``score`` on this thread's stream after ``event`` of the sampling stream."""
    if event is not None:
        stream = torch.cuda.current_stream()
        event.wait(stream)
        for tensor in (images.pixels, images.finite):
            tensor.record_stream(stream)  # the other thread may free it earlier
    return score(images, *arguments)


def gather_scores(
    dist: Distributed, score: Callable[[], list[Scores]], thumbs: Tensor, max_unscored: int = 0
) -> tuple[Scores, Tensor]:
    """Scores and thumbnails of all ranks, in rank order.

    ``score`` returns this rank's scores.  If it raises RewardError or Preempted on any rank, every
    rank raises it, so that all of them stop in step and save.  Every rank raises UnscoredError if
    more than ``max_unscored`` images of all ranks have no score.
    """
    local, failure = Scores.concatenate([]), None
    try:
        local = Scores.concatenate(score())
    except (RewardError, Preempted) as error:
        failure = error
    gathered = dist.gather_objects((local, thumbs, failure))
    failures = {rank: error for rank, (_, _, error) in enumerate(gathered) if error}
    kinds = {type(error) for error in failures.values()}
    if Preempted in kinds:
        raise Preempted
    if failures:
        kind = UnscoredError if kinds == {UnscoredError} else RewardError
        named = "; ".join(f"{error} (on rank {rank})" for rank, error in failures.items())
        raise kind(named) from failure
    scores = Scores.concatenate([scores for scores, *_ in gathered if len(scores.total)])
    scores.check_unscored(max_unscored)
    for reason in islice(scores.reasons.values(), MAX_NAMED):
        dist.log(f"left out, without a score: {reason}")
    return scores, torch.cat([thumbs for _, thumbs, _ in gathered])
