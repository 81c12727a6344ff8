"""Estimate a job's progress in percent of its time, weighing each stage by its duration in earlier jobs."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

_RECENT_JOBS = 20
# Of the denoising time, until a job has finished.
_DEFAULT_RATIOS = {"load": 0.02, "encode": 0.02, "decode": 0.15, "finish": 0.03}
_MAX_ESTIMATED_SHARE = 0.95  # of a stage, as long as it has not ended


class StageRatios:
    """Keep the median ratio of each stage's time to the denoising time over recent jobs.

    The ratio hardly depends on the size of the video, as all stages grow with it.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, deque[float]] = {stage: deque(maxlen=_RECENT_JOBS) for stage in _DEFAULT_RATIOS}

    def learn(self, timings: Mapping[str, float]) -> None:
        """Add a finished job; ignore one that denoised nothing because it continued from its last checkpoint."""
        denoise_seconds = timings.get("denoise", 0.0)
        if denoise_seconds > 0:
            for stage, ratios in self._ratios.items():
                ratios.append(timings.get(stage, 0.0) / denoise_seconds)

    def learn_all(self, jobs: Iterable[Mapping[str, float]]) -> None:
        for timings in jobs:
            self.learn(timings)

    def ratio(self, stage: str) -> float:
        ratios = self._ratios[stage]
        return statistics.median(ratios) if ratios else _DEFAULT_RATIOS[stage]


class AttemptProgress:
    """Estimate the progress of one attempt. It never falls; the queue sets 100 when the job is finished."""

    def __init__(
        self, ratios: StageRatios, share_denoised: float = 0.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start at `share_denoised` (0..1), the share of the steps that a checkpoint holds."""
        self._ratios, self._clock = ratios, clock
        self._stage, self._since = "denoise" if share_denoised else "", clock()
        self._share_denoised = share_denoised
        self._denoise_seconds: float | None = None  # estimate for all steps
        self._denoise_seconds_left: float | None = None
        self._highest = 0.0
        self._highest = self.percent  # a later load stage must not lower it

    def stage(self, stage: str) -> None:
        self._stage, self._since = stage, self._clock()

    def step(self, step: int, steps: int, seconds_left: float | None) -> None:
        self._stage, self._since = "denoise", self._clock()
        self._share_denoised = step / steps
        self._denoise_seconds_left = seconds_left
        if seconds_left is not None and step < steps:
            self._denoise_seconds = seconds_left / (steps - step) * steps

    @property
    def percent(self) -> float:
        """Return 0..99, in proportion to time."""
        load, encode, decode, finish = (self._ratios.ratio(stage) for stage in _DEFAULT_RATIOS)
        if self._stage in ("", "load"):
            done = load * self._estimated_share(load)
        elif self._stage == "encode":
            done = load + encode * self._estimated_share(encode)
        else:
            done = load + encode + self._share_denoised
        if self._share_denoised == 1:
            if self._stage == "decode":
                done += decode * self._estimated_share(decode)
            elif self._stage == "finish":
                done += decode + finish * self._estimated_share(finish)
        self._highest = max(self._highest, min(99.0, 100 * done / (load + encode + 1 + decode + finish)))
        return self._highest

    @property
    def seconds_left(self) -> float | None:
        """Estimate the remaining time; None before the first step."""
        if self._denoise_seconds is None or self._denoise_seconds_left is None:
            return None
        decode, finish = self._ratios.ratio("decode"), self._ratios.ratio("finish")
        since = self._clock() - self._since
        if self._share_denoised < 1:
            left = max(0.0, self._denoise_seconds_left - since) + self._denoise_seconds * (decode + finish)
        elif self._stage == "finish":
            left = self._denoise_seconds * finish - since
        else:
            left = self._denoise_seconds * (decode + finish) - (since if self._stage == "decode" else 0.0)
        return max(0.0, left)

    def _estimated_share(self, ratio: float) -> float:
        """Estimate the elapsed share (0..1) of a stage without steps, from its duration in earlier jobs."""
        if not self._denoise_seconds or not ratio:
            return 0.0
        return min(_MAX_ESTIMATED_SHARE, (self._clock() - self._since) / (self._denoise_seconds * ratio))
