"""How far a job is, in percent of the time it takes: each stage weighs what it took in earlier jobs."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

_KNOWN_JOBS = 20
_BEFORE_ANY = {"load": 0.02, "decode": 0.15, "finish": 0.03}  # of the time of denoising; a guess, until a job is done
_ALMOST = 0.95  # how far a stage gets by the clock alone


class Pace:
    """Seconds of a stage by those of denoising, the median of the last jobs: it grows with the video as they do."""

    def __init__(self) -> None:
        self._ratios: dict[str, deque[float]] = {stage: deque(maxlen=_KNOWN_JOBS) for stage in _BEFORE_ANY}

    def learn(self, timings: Mapping[str, float]) -> None:
        """From a finished job. One that went on from its last checkpoint has denoised nothing and says nothing."""
        denoise_seconds = timings.get("denoise", 0.0)
        if denoise_seconds > 0:
            for stage, ratios in self._ratios.items():
                ratios.append(timings.get(stage, 0.0) / denoise_seconds)

    def learn_all(self, jobs: Iterable[Mapping[str, float]]) -> None:
        for timings in jobs:
            self.learn(timings)

    def ratio(self, stage: str) -> float:
        ratios = self._ratios[stage]
        return statistics.median(ratios) if ratios else _BEFORE_ANY[stage]


class Progress:
    """Of one attempt. It never falls, and reaches 100 only when the job is finished (by the queue, not here)."""

    def __init__(self, pace: Pace, share_denoised: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`share_denoised` of the steps (0..1) is taken over from a checkpoint."""
        self._pace, self._clock = pace, clock
        self._stage, self._since = "denoise" if share_denoised else "", clock()
        self._share_denoised = share_denoised
        self._denoise_seconds: float | None = None  # all steps, as far as is known
        self._denoise_seconds_left: float | None = None
        self._highest = 0.0
        self._highest = self.percent  # loading does not take it back

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
        """0..99, in proportion to time."""
        load, decode, finish = (self._pace.ratio(stage) for stage in ("load", "decode", "finish"))
        if self._stage in ("", "load"):
            done = load * self._by_the_clock(load)
        else:
            done = load + self._share_denoised
        if self._share_denoised == 1:
            if self._stage == "decode":
                done += decode * self._by_the_clock(decode)
            elif self._stage == "finish":
                done += decode + finish * self._by_the_clock(finish)
        self._highest = max(self._highest, min(99.0, 100 * done / (load + 1 + decode + finish)))
        return self._highest

    @property
    def seconds_left(self) -> float | None:
        """None before the first step."""
        if self._denoise_seconds is None or self._denoise_seconds_left is None:
            return None
        decode, finish = self._pace.ratio("decode"), self._pace.ratio("finish")
        since = self._clock() - self._since
        if self._share_denoised < 1:
            left = max(0.0, self._denoise_seconds_left - since) + self._denoise_seconds * (decode + finish)
        elif self._stage == "finish":
            left = self._denoise_seconds * finish - since
        else:
            left = self._denoise_seconds * (decode + finish) - (since if self._stage == "decode" else 0.0)
        return max(0.0, left)

    def _by_the_clock(self, ratio: float) -> float:
        """How much of a stage that tells no steps is over, if it takes as long as in other jobs."""
        if not self._denoise_seconds or not ratio:
            return 0.0
        return min(_ALMOST, (self._clock() - self._since) / (self._denoise_seconds * ratio))
