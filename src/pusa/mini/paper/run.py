"""Run `pusa eval paper`: test claims of Pusa V1.0 (arXiv 2507.16116) on the small base model at equal budgets.

Five adapters train on one frozen base with the same clips in the same order for the same number of steps; only the
distribution of their timesteps differs. The run then measures points of curves over training steps, inference steps,
alpha and noise.

On a CPU two processes of one thread share the work: the first trains, the second measures what is ready, and in the end
both measure. Every finished part is a file in the output folder, from which a stopped run resumes.
"""

import json
import logging
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pusa.fsutil import replacing, sha256_of
from pusa.mini.paper import points, report, training
from pusa.mini.paper.points import STEPS, Point
from pusa.mini.paper.training import BATCH, BEST_ALPHAS, CURVE, REGIMES, Plan
from pusa.training.reports.charts import load_figure_class

PLAN_FILE, REPORT_FILE = "plan.json", "paper.json"
REFERENCES = "references"

ALPHAS = (0.5, 1.4, 2.0, 3.0)
INFERENCE_STEPS = (1, 2, 4, 20, 50)
NOISES = (0.1, 0.2, 0.4, 0.7, 1.0)

_TRAINING_SHARE = 0.6  # of the first process's time
_SPARE = 0.85  # of the time that is left is planned for
_START_SECONDS = 60.0  # until all is loaded and compiled
_COMPILING_MINUTES = 4.0  # below it, compiling costs more than it gains
_MOST_CLIPS = 32

Log = Callable[[str], None]


# ---- jobs -------------------------------------------------------------------------------------------


def points_of(plan: Plan) -> list[Point]:
    """List every point, the most important ones first."""
    parts = [round(plan.steps * share) for share in (1, 0.5, 0.25)]
    paper = partial(Point, regime="independent", step=plan.steps)
    selected = [Point("base", ("losses", "image", "caption", "text"))]
    selected += [Point(f"{r} {plan.steps}", ("losses", "image", "caption", "text"), r, plan.steps) for r in REGIMES]
    selected += [Point(f"{r} {step}", ("losses", "image"), r, step) for step in parts[1:] for r in REGIMES]
    selected += [paper(f"alpha {alpha:g}", ("image", "caption"), alpha=alpha) for alpha in ALPHAS]
    few = [steps for steps in INFERENCE_STEPS if steps <= 2 * STEPS]
    selected += [paper(f"steps {steps}", ("image", "caption"), steps=steps) for steps in few]
    selected += [paper(f"noise {noise:g}", ("image",), noise=noise) for noise in NOISES]
    selected += [paper(f"steps {steps}", ("image",), steps=steps) for steps in INFERENCE_STEPS if steps > 2 * STEPS]
    others = [regime for regime in REGIMES if regime != "independent"]
    selected += [
        Point(f"{r} alpha {a:g}", ("image", "caption"), r, plan.steps, alpha=a) for r in others for a in BEST_ALPHAS
    ]
    return selected


@dataclass(frozen=True)
class PaperJob:
    """Describe a part that writes the file `result`, can start once the files `needs` exist, and takes about `seconds`.

    A job that `must` run does so however late it is, and time is reserved for it: the trainings and their last points.
    """

    name: str
    result: Path
    work: Callable[[], None]
    needs: tuple[Path, ...] = ()
    seconds: float = 0.0
    must: bool = False
    trains: bool = False

    def is_ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def jobs_of(
    work: Path, out: Path, plan: Plan, *, seconds_per_step: float, seconds_per_forward: float
) -> list[PaperJob]:
    """List the jobs in order of importance; a process takes the first one that is ready."""
    adapter = partial(training.adapter_path, out)
    jobs = [
        PaperJob(
            f"train {regime}",
            adapter(regime, plan.steps),
            partial(training.train_regime, work, out, plan, regime),
            seconds=plan.steps * seconds_per_step,
            must=True,
            trains=True,
        )
        for regime in REGIMES
    ]
    probe = points.probe_path(out)
    result = result_path(out, REFERENCES)
    references = partial(_measure_references, work, out, plan, result)
    jobs.append(PaperJob(REFERENCES, result, references, needs=(probe,), must=True))
    for point in points_of(plan):
        needs = [probe] if point.regime is None else [probe, adapter(point.regime, point.step)]
        result = result_path(out, point.name)
        jobs.append(
            PaperJob(
                point.name,
                result,
                partial(_measure, work, out, plan, point, result),
                needs=tuple(needs),
                seconds=point.cost(plan) * seconds_per_forward,
                must="text" in point.measures,
            )
        )
    return jobs


def result_path(out: Path, name: str) -> Path:
    return out / "points" / f"{name.replace(' ', '-')}.json"


def _measure(work: Path, out: Path, plan: Plan, point: Point, result: Path) -> None:
    measured = points.cached_judge(work, out, plan).measure(point)
    _write_json(result, {"point": asdict(point), "measured": measured})


def _measure_references(work: Path, out: Path, plan: Plan, result: Path) -> None:
    _write_json(result, points.cached_judge(work, out, plan).references())


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n")


# ---- how much of it ------------------------------------------------------------------------------------------------


def make_plan(
    minutes: float, processes: int, *, seconds_per_step: float, seconds_per_forward: float, compiled: bool
) -> Plan:
    """Plan as many training steps and clips per point as fit into `minutes` of `processes`."""
    seconds = max(60 * minutes - _START_SECONDS, 30 * minutes)
    share = _TRAINING_SHARE if processes > 1 else _TRAINING_SHARE / 2
    steps = max(1, int(share * seconds / (len(REGIMES) * seconds_per_step) / CURVE)) * CURVE
    left = _SPARE * (processes * seconds - len(REGIMES) * steps * seconds_per_step)

    def plan(clips: int) -> Plan:
        return Plan(steps, clips, 32 if compiled else 8, _probe_steps(compiled), compiled)

    def cost(clips: int) -> float:
        return seconds_per_forward * sum(point.cost(plan(clips)) for point in points_of(plan(clips)))

    fitting = [clips for clips in range(BATCH, _MOST_CLIPS + 1, BATCH) if cost(clips) <= left]
    return plan(max(fitting, default=BATCH))


def _calibrate(work: Path, out: Path, compiled: bool) -> tuple[float, float]:
    """Measure seconds per training step and per forward pass of one clip, on this machine at its present load."""
    step = training.seconds_per_training_step(work, out / "calibration", compiled=compiled)
    trial = Plan(CURVE, BATCH, BATCH, probe_steps=1, compiled=compiled)
    return step, points.Judge(work, out, trial).seconds_per_forward()


def _probe_steps(compiled: bool) -> int:
    """Return the training steps of the probe; a short run has a poor probe."""
    return 300 if compiled else 60


def _fingerprint(work: Path) -> str:
    """Hash the base, so that results of two bases are never mixed."""
    path = work / "base.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{work} has no base.safetensors: `pusa mini train {work} --until base` makes it")
    return sha256_of(path)


# ---- the run ------------------------------------------------------------------------------------------------------


def start_process(threads: int) -> Executor:
    """Start a pool of one process that computes with this number of threads.

    What takes seconds to import is imported once for all pools.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(1, context, initializer=_initialise_process, initargs=(threads,))


def _initialise_process(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process silently; the trainer handles it itself
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of norms under autocast
    torch.set_num_threads(threads)
    logging.getLogger("pusa").setLevel(logging.WARNING)


def run(
    work: Path,
    out: Path | None = None,
    *,
    minutes: float = 12.0,
    processes: int | None = None,
    steps: int | None = None,
    clips: int | None = None,
    seed: int = 0,
    page: Path | None = None,
    say: Log = print,
    start_pool: Callable[[int], Executor] = start_process,
) -> dict[str, Any]:
    """Run the unfinished jobs, and write tables, plots and figures to `out`.

    Args:
        work: a folder in which `pusa mini train` has finished its base.
        out: the folder of results; None: ``paper`` in `work`.
        minutes: the time that the first run plans for. After it, only the trainings and their last points still run.
        processes: number that share the work; None: two of one thread on a CPU, one with a GPU.
        steps: steps of each training, a multiple of 4; None: as many as fit into the time.
        clips: clips per point, a multiple of 4; None: as many as fit. Explicit numbers do not depend on the machine.
        seed: of the trainings; the clips and noise that they are measured with are always the same.
        page: a Markdown file; the tables replace its part between the marks of `report`, the plots go to a folder of
            its name beside it.
        say: receives progress, a line at a time.
        start_pool: starts the pool that runs one share of the work with a number of threads.

    Returns:
        The report, as in ``paper.json``; "left_out" names what there was no time for.

    Raises:
        FileNotFoundError: there is no base in `work`.
        ValueError: `out` holds results of another base or of other `steps`, `clips` or `seed`, steps or clips are no
            multiples of 4, or `page` has no marks.
        RuntimeError: matplotlib is not installed.
    """
    import torch

    explicit = {name: value for name, value in (("steps", steps), ("clips", clips)) if value is not None}
    for name, value in explicit.items():
        if value < 4 or value % 4:
            raise ValueError(f"{name}={value} is no multiple of 4")
    if page is not None:
        report.check_page(page)
    load_figure_class()  # now, as the charts come last
    out = work / "paper" if out is None else out
    processes = processes or (1 if torch.cuda.is_available() else 2)
    began = time.monotonic()
    fingerprint = _fingerprint(work)
    stored = _read_plan(out, fingerprint, {**explicit, "seed": seed})
    out.mkdir(parents=True, exist_ok=True)
    threads = 1 if processes > 1 else torch.get_num_threads()
    with ExitStack() as stack:
        pools = [stack.enter_context(start_pool(threads)) for _ in range(processes)]
        compiled = stored["plan"]["compiled"] if stored else minutes >= _COMPILING_MINUTES
        probing = None
        if not points.probe_path(out).exists():
            probing = pools[-1].submit(points.train_probe, work, out, _probe_steps(compiled))
        if stored is None:
            say("calibrating")
            step, forward = pools[0].submit(_calibrate, work, out, compiled).result()
            plan = make_plan(minutes, processes, seconds_per_step=step, seconds_per_forward=forward, compiled=compiled)
            plan = replace(plan, steps=steps or plan.steps, clips=clips or plan.clips, seed=seed)
            speed = {"seconds_per_step": step, "seconds_per_forward": forward}
            stored = {"base": fingerprint, "plan": asdict(plan), "speed": speed}
            _write_json(out / PLAN_FILE, stored)
        plan = Plan(**stored["plan"])
        say(f"{plan.steps} steps of each of {len(REGIMES)} trainings, {plan.clips} clips per point")
        if probing is not None:
            probing.result()
        jobs = jobs_of(work, out, plan, **stored["speed"])
        left_out = _run_jobs(jobs, pools, deadline=began + 60 * minutes, began=began, say=say)
    results = write_report(work, out, [out], [plan], left_out, page)
    if left_out:
        say(f"no time was left for {', '.join(left_out)}: the same command goes on with it")
    return results


def write_report(
    work: Path, out: Path, outs: Sequence[Path], plans: Sequence[Plan], left_out: Sequence[str], page: Path | None
) -> dict[str, Any]:
    """Write the report of one run, or of several seeds', to `out` and into the page; return it."""
    results = report.collect(work, outs, plans, left_out)
    _write_json(out / REPORT_FILE, results)
    report.write(results, out, page)
    return results


def run_seeds(
    work: Path,
    out: Path | None = None,
    *,
    seeds: Sequence[int],
    minutes: float,
    steps: int | None = None,
    clips: int | None = None,
    page: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run one seed as `run` does, or several, each in a folder ``seed-N`` of its own, and judge them together.

    Args:
        seeds: different from each other; all have the steps and clips that the first one plans.
        minutes: for all of them together.
        work, out, steps, clips, page, options: as `run` takes them.

    Returns:
        The report of all seeds.

    Raises:
        ValueError: a seed is there twice; otherwise as `run`.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: give each one once")
    if len(seeds) == 1:
        return run(work, out, minutes=minutes, steps=steps, clips=clips, seed=seeds[0], page=page, **options)
    if page is not None:
        report.check_page(page)
    out = work / "paper" if out is None else out
    outs, plans, left_out = [out / f"seed-{seed}" for seed in seeds], [], []
    for seed, folder in zip(seeds, outs, strict=True):
        share = minutes / len(seeds)
        results = run(work, folder, minutes=share, steps=steps, clips=clips, seed=seed, **options)
        plan = Plan(**results["plan"])
        steps, clips = plan.steps, plan.clips
        plans.append(plan)
        left_out += [f"{name} of seed {seed}" for name in results["left_out"]]
    return write_report(work, out, outs, plans, left_out, page)


def _read_plan(out: Path, fingerprint: str, explicit: Mapping[str, int]) -> dict[str, Any] | None:
    """Read the plan of an earlier call; None if there was none.

    Raises:
        ValueError: it is of another base, or its steps or clips are not the explicit ones.
    """
    if not (out / PLAN_FILE).is_file():
        return None
    stored = json.loads((out / PLAN_FILE).read_text())
    if stored["base"] != fingerprint:
        raise ValueError(f"{out} holds results of another base: name another folder with --out")
    for name, value in explicit.items():
        if (before := asdict(Plan(**stored["plan"]))[name]) != value:
            kind = f"seed {before}" if name == "seed" else f"{before} {name}"
            raise ValueError(f"{name}={value}: {out} holds results of {kind}: name another folder with --out")
    return stored


def _run_jobs(jobs: list[PaperJob], pools: list[Executor], *, deadline: float, began: float, say: Log) -> list[str]:
    """Run the jobs; the first pool trains before it measures, the others only measure. Return the jobs left out."""
    pending = [job for job in jobs if not job.result.exists()]
    running: dict[Future[None], tuple[int, PaperJob]] = {}
    left_out: list[str] = []
    while pending or running:
        reserved = _reserved_seconds([*pending, *(job for _, job in running.values())], len(pools))
        latest = deadline - time.monotonic() - reserved
        left_out += [job.name for job in pending if not job.must and job.seconds > latest]
        pending = [job for job in pending if job.name not in left_out]
        busy = {pool for pool, _ in running.values()}
        for pool in sorted(set(range(len(pools))) - busy):
            job = next(_available_jobs(pending, trains=pool == 0), None)
            if job is not None:
                pending.remove(job)
                running[pools[pool].submit(job.work)] = pool, job
        if pending and not running:
            raise RuntimeError(f"{pending[0].name} waits for files that nothing makes: {pending[0].needs}")
        done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            _, job = running.pop(future)
            future.result()
            say(f"{time.monotonic() - began:5.0f} s  {job.name}")
    return left_out


def _reserved_seconds(jobs: list[PaperJob], pools: int) -> float:
    """Estimate the time of the jobs that must run, if one pool does all the training."""
    training_seconds = sum(job.seconds for job in jobs if job.trains)
    return max(training_seconds, sum(job.seconds for job in jobs if job.must) / pools)


def _available_jobs(pending: list[PaperJob], *, trains: bool) -> Iterator[PaperJob]:
    """Yield the jobs that a pool may take, in its order."""
    if trains:
        yield from (job for job in pending if job.trains)
    yield from (job for job in pending if not job.trains and job.is_ready())
