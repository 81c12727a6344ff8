"""Load a request's model by a plan, keep it for the next one, and change to a smaller plan where memory runs out."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pusa import loading, zoo
from pusa.acceleration import attention, compilation, placement, quantization, step_cache
from pusa.acceleration.decisions import LoadOptions, Machine, PartPlan, Plan
from pusa.errors import first_line
from pusa.events import BytesProgress, Note, Planned, Report
from pusa.generate import loras
from pusa.lora.adapters import adapter_names
from pusa.lora.placement import PlacedFile
from pusa.lora.sources import EXPERTS
from pusa.models.streaming import Progress
from pusa.models.vae import is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.request import ResolvedRequest, placeholder_request

Load = Callable[[Plan | None, Progress], tuple[PusaPipeline, loras.Loras]]


@dataclass(eq=False)
class Resident:
    """Hold a loaded model, how it runs here, and the plans that need less memory.

    Attributes:
        pipe: the pipeline; the same object for as long as the model is held, whatever becomes of its parts.
        loras: files of its LoRAs.
        fast: files of the 4-step LoRA beside them, by expert; empty until a request asks for it.
        notes: what people should know of the model that was loaded.
        plans: the plan that it runs by, and then smaller ones; none for a pipeline that the caller has made.
        machine: as it was before the model was loaded: what is free now does not count what the model itself takes.
    """

    pipe: PusaPipeline | None
    loras: loras.Loras
    options: LoadOptions = field(default_factory=LoadOptions)
    plans: list[Plan] = field(default_factory=list)
    device: str = "cuda"
    machine: Machine | None = None
    notes: list[str] = field(default_factory=list)
    fast: dict[str, PlacedFile] = field(default_factory=dict)
    _load: Load | None = None
    _request: ResolvedRequest | None = None
    _is_read: bool = False
    _failed: list[tuple[Any, int]] = field(default_factory=list)

    @property
    def plan(self) -> Plan | None:
        """The plan that the model runs by."""
        return self.plans[0] if self.plans else None

    def part(self, name: str) -> PartPlan | None:
        """Return the plan of one part, such as a text encoder that is loaded for new prompts only."""
        return None if self.plan is None else self.plan.parts.get(name)

    # ---- requests ----

    def prepare(
        self,
        request: ResolvedRequest,
        plans: Sequence[Plan] | None,
        report: Report,
        *,
        progress: Progress | None = None,
    ) -> PusaPipeline:
        """Make the model run by the best plan for a request, with the request's shift and alphas.

        Args:
            plans: best first; None: those of `choose_plans`.
            progress: called with the bytes read so far and those of all; None: `report` receives them as steps.

        Raises:
            ResourcesError: no plan fits this machine.
            torch.OutOfMemoryError: the smallest plan does not fit.
            ValueError, FileNotFoundError: the model or a LoRA cannot be loaded.
        """
        if self._is_read and not self.fast:
            loras.fetch_fast(request)  # raises before anything is given up; the first loading looks for it itself
        before, self._request = self._request, request
        if self.pipe is not None:
            step_cache.disable(self.pipe)  # before hooks of another plan, and with the state of the last request
        if self._load is not None:
            self._check_kernels(report)
            found = self._without_failed(list(plans) if plans is not None else self._choose(request), request)
            is_same = self.plan is not None and (not found or _placement(found[0]) == _placement(self.plan))
            self.plans = found or self.plans
            if before is not None and self._is_stale(before, request):
                report(
                    Note(
                        "the LoRAs are merged for good: the model is loaded again for another alpha",
                        code="model_reloaded",
                    )
                )
                self._is_read = False
            if self._is_read and loras.fast_lora(request) and not self.fast:
                report(Note("the model is loaded again, with its 4-step LoRA", code="model_reloaded"))
                self._is_read = False
            if not (is_same and self._is_read):
                self._until_it_fits(report, progress)
        pipe = self._loaded
        pipe.scheduler = pipe.base.with_shift(pipe.scheduler, request.shift)
        if not placement.is_alpha_frozen(pipe):
            loras.set_alphas(pipe, request, self.loras)
        step_cache.enable(pipe, request.step_cache)
        self._announce(report)
        return pipe

    def take_smaller_plan(self, where: str, report: Report) -> bool:
        """Change to the next plan that fits after memory ran out; False if there is none.

        The exception must have been dropped before, as it holds the tensors of the failed attempt.

        Args:
            where: what was being done, such as "step 3 of 10".
        """
        if len(self.plans) < 2 or self._request is None:
            return False
        self._drop_plan(f"out of memory in {where}: a smaller plan takes over", report)
        step_cache.disable(self._loaded)
        self._until_it_fits(report)
        step_cache.enable(self._loaded, self._request.step_cache)
        self._announce(report)
        return True

    @property
    def acting_loras(self) -> list[dict[str, PlacedFile]]:
        """Files of the LoRAs that act for the request: those of the model or the request, and a 4-step one."""
        is_fast = self._request is not None and loras.fast_lora(self._request) is not None
        return [*self.loras, *([self.fast] if is_fast and self.fast else [])]

    # ---- plans ----

    @property
    def _loaded(self) -> PusaPipeline:
        assert self.pipe is not None
        return self.pipe

    def _choose(self, request: ResolvedRequest) -> list[Plan]:
        if not torch.cuda.is_available() and not files_of(request.model, self.options):
            return []  # nothing to decide: see `plan_as_loaded`
        if self.machine is None:
            from pusa.acceleration.machine import machine

            self.machine = machine()
        found = choose_plans(request, self.options, self.machine)
        if not torch.cuda.is_available():
            return [plan for plan in found if any(part.kept for part in plan.parts.values())]
        ranks = self.options.gpus or 1  # as many processes as share the work
        return [plan for plan in found if plan.parallel.ranks == ranks] or found

    def _check_kernels(self, report: Report) -> None:
        """Check, before anything is read, that what is asked for can be had here; compiling on "auto" can be missed."""
        options, has_card = self.options, torch.cuda.is_available()
        attention.choose(torch.cuda.get_device_capability() if has_card else None, asked=options.attention)
        if options.compile == "never" or (options.compile == "auto" and not has_card):
            return
        if reason := compilation.missing_tool("cuda" if has_card else "cpu"):
            if options.compile == "always":
                raise RuntimeError(f"compile=always: {reason}; or leave it out")
            report(Note(f"not compiled: {reason}", code="not_compiled", values={"reason": reason}))
            self.options = replace(options, compile="never")

    def _without_failed(self, plans: list[Plan], request: ResolvedRequest) -> list[Plan]:
        """Leave out plans that ran out of memory for a request of this size or a smaller one."""
        size = math.prod(_clip_of(request))
        failed = [place for place, failed_size in self._failed if failed_size <= size]
        return [plan for plan in plans if (_placement(plan), plan.computes_all) not in failed] or plans[-1:]

    def _until_it_fits(self, report: Report, progress: Progress | None = None) -> None:
        """Load the model, or rearrange it, by the first plan that fits."""
        while True:
            try:
                return self._carry_out(progress or BytesProgress(report, "load"))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if len(self.plans) < 2:
                raise torch.OutOfMemoryError(
                    f"out of memory while the model was loaded ({reason}): close other programs, ask for a smaller "
                    "size or fewer frames, or take a smaller model"
                )
            self._drop_plan("out of memory while the model was loaded: a smaller plan takes over", report)

    def _drop_plan(self, message: str, report: Report) -> None:
        assert self._request is not None
        failed = _placement(self.plans[0]), self.plans[0].computes_all
        self._failed.append((failed, math.prod(_clip_of(self._request))))
        self.plans = self.plans[1:]
        report(Note(message, code="smaller_plan"))
        free_memory()

    def _carry_out(self, progress: Progress) -> None:
        request = self._request
        assert request is not None
        if not self._is_read or (self.plan is not None and not placement.can_apply(self._loaded, self.plan)):
            self._read(progress)
        pipe = self._loaded
        if self.plan is None:
            self.plans = [plan_as_loaded(pipe, request.model, self.options)]
        if not placement.is_alpha_frozen(pipe):
            loras.set_alphas(pipe, request, self.loras)  # before they are merged into weights that are rounded after it
        placement.apply(pipe, self.plans[0], device=self.device)

    def _read(self, progress: Progress) -> None:
        """Read the model; parts that were there before are given up first."""
        assert self._load is not None
        old, self._is_read = self.pipe, False
        if old is not None:
            placement.discard(old)
            free_memory()
        pipe, self.loras = self._load(self.plan, progress)
        if old is None:
            self.pipe = pipe
        else:
            old.register_modules(**{name: getattr(pipe, name) for name in placement.PARTS})
        self._is_read = True

    def _is_stale(self, before: ResolvedRequest, request: ResolvedRequest) -> bool:
        """Tell if a request has other alphas than those that are merged into weights for good."""
        if not (self._is_read and placement.is_alpha_frozen(self._loaded)):
            return False
        strengths = [(loras.alphas(one, self.loras), loras.fast_lora(one)) for one in (before, request)]
        return strengths[0] != strengths[1]

    def _announce(self, report: Report) -> None:
        if self.plan is not None:
            reasons = [f"{name}: {part.reason}" for name, part in self.plan.parts.items() if part.reason]
            public = replace(self.plan, model=zoo.public_name(self.plan.model))  # without this machine's folders
            report(Planned(public.summary, (*reasons, *self.plan.notes)))


def choose_plans(request: ResolvedRequest, options: LoadOptions, machine: Machine) -> list[Plan]:
    """Ask for the plans of a request's model on a machine, best first, each next one with less GPU memory."""
    from pusa.acceleration import planning

    return planning.plans(
        request.model,
        size=_clip_of(request),
        machine=machine,
        options=options,
        guidance=request.guidance,
        lora_ranks=loras.ranks_of(request) or None,
        still_frames=0 if request.exact else request.still_frames,
    )


def plan_as_loaded(pipe: PusaPipeline, model: str, options: LoadOptions) -> Plan:
    """Describe a pipeline on the CPU as it was loaded, but for weights that `options` wants in fewer bits.

    A machine without a GPU leaves nothing else to decide.
    """
    from pusa.acceleration import planning

    parts = {}
    for name in placement.PARTS:
        module = getattr(pipe, name, None)
        if module is None:
            continue
        storage, reason = quantization.storage_of(module), ""
        if name.startswith("transformer") and options.quantize in ("fp8", "int8"):
            storage, reason = options.quantize, f"its weights are stored as {options.quantize}, as asked for"
        dtype: Literal["float32", "bfloat16"] = "bfloat16" if module.dtype == torch.bfloat16 else "float32"
        parts[name] = PartPlan(dtype, storage, "cpu", reason=reason)
    plan = Plan(zoo.public_name(model), options.memory, parts)
    experts = [expert for name in EXPERTS if (expert := getattr(pipe, name, None)) is not None]
    has_loras = any(map(adapter_names, experts))
    return planning.with_kernels(plan, options, None, has_loras=has_loras)


def _placement(plan: Plan) -> Any:
    """Return what of a plan changes the pipeline."""
    parts = {name: replace(part, reason="") for name, part in plan.parts.items()}
    return (
        parts,
        plan.merge,
        replace(plan.parallel, reason=""),
        plan.is_fast,
        plan.attention,
        plan.compile,
        plan.compile_decoder,
    )


def _clip_of(request: ResolvedRequest) -> tuple[int, int, int]:
    """Return width, height and frames of what is made at once: the video, or a window of a long one."""
    return request.width, request.height, min(request.frames, request.window)


def _dtypes(plan: Plan | None) -> dict[str, torch.dtype] | None:
    """Return the dtype to load each part in; None: the model's own."""
    if plan is None:
        return None
    names = {
        name: part.storage if part.storage in quantization.FULL else part.dtype for name, part in plan.parts.items()
    }
    default = names.get("transformer", "float32")
    return {name: getattr(torch, dtype) for name, dtype in {"default": default, **names}.items()}


def free_memory() -> None:
    """Return memory of objects that are gone to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the last model ------------------------------------------------------------------------------------------------

_resident: dict[tuple[Any, ...], Resident] = {}  # only the last one: models are large


def resident_of(
    request: ResolvedRequest, options: LoadOptions, *, device: str = "cuda", is_planned: bool = False
) -> Resident:
    """Return the model of a request if it was the last one; else let that one go and return a new one, to `prepare`.

    Files that have changed since are read again.

    Args:
        is_planned: the caller has plans of its own, which the next request without any must not inherit.
    """
    sources = tuple(request.lora)
    stats = loras.stats_of(local_folder(request.model), sources, files_of(request.model, options).values())
    key = request.model, sources, request.lora_layers, options, device, is_planned, stats
    if key not in _resident:
        _resident.clear()
        free_memory()
        resident = Resident(None, [], options, device=device)
        resident._load = partial(_load, request.model, sources, request.lora_layers, resident)
        _resident[key] = resident
    return _resident[key]


def load_pipeline(
    model: str,
    sources: tuple[str, ...] = (),
    layers: Literal["all", "fitting"] = "all",
    load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> PusaPipeline:
    """Load a pipeline with its adapters to its device, or return it if it was the last one loaded.

    It runs by the plan for the model's own size and length. Files that have changed since are read again. `progress` is
    called with the bytes read so far and those of all.
    """
    defaults = zoo.defaults_of(model)
    request = placeholder_request(defaults, model=model, lora=list(sources), lora_layers=layers, seed=0)
    resolved = request.resolved(defaults)
    return resident_of(resolved, load or LoadOptions()).prepare(resolved, None, lambda event: None, progress=progress)


def vae_of(request: ResolvedRequest, options: LoadOptions, device: str = "cuda") -> Resident:
    """Return the VAE of a request's model alone, to `prepare`; it is not kept for other requests."""
    unused = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "transformer_2"))

    def load(plan: Plan | None, progress: Progress) -> tuple[PusaPipeline, loras.Loras]:
        dtypes = _dtypes(plan)
        given = {"files": options.files, "progress": progress, **({"dtype": dtypes} if dtypes else {})}
        return PusaPipeline.from_pretrained(request.model, **unused, **given), []

    return Resident(None, [], options, device=device, _load=load)


def local_folder(model: str) -> Path | None:
    """Return the folder of a model that is on this machine; None for one of the Hub."""
    entry = zoo.find(model)
    folder = entry.folder if entry and entry.folder else Path(model).expanduser()
    return folder if folder.is_dir() and (entry is None or entry.folder) else None


def files_of(model: str, options: LoadOptions) -> dict[str, Path]:
    """Return the single files that parts of a model are read from: part -> file."""
    entry = zoo.find(model)
    return {**(entry.files if entry else {}), **options.files}


def _load(
    model: str,
    lora_sources: tuple[str, ...],
    layers: Literal["all", "fitting"],
    resident: Resident,
    plan: Plan | None,
    progress: Progress,
) -> tuple[PusaPipeline, loras.Loras]:
    loras.check_files(lora_sources)
    fast = loras.fetch_fast(resident._request) if resident._request else {}
    entry = zoo.find(model)
    sources: list[Any] = list(lora_sources)
    resident.notes = []
    if entry and not sources:
        sources, resident.notes = loras.own_files(entry)
    in_package = entry is not None and entry.is_ours
    # In other models the text encoder is the largest part after the transformer: load it for new prompts only.
    given: dict[str, Any] = {} if in_package else {"text_encoder": None}
    if plan is not None:
        stored = {part: how.storage for part, how in plan.parts.items()}
        given["dtype"] = _dtypes(plan)
        as_is = ("fp8", "float32")  # other storages are made of bf16
        given["storage"] = {part: kind if kind in as_is else "bfloat16" for part, kind in stored.items()}
        given["device"] = placement.devices_to_load(plan, resident.device)
        given["as_fp8"] = placement.parts_read_as_fp8(plan)
        given["keep_quantized"] = [part for part, how in plan.parts.items() if how.kept]
    pipe = PusaPipeline.from_pretrained(model, files=resident.options.files, progress=progress, **given)
    attached = loras.attach(pipe, sources, layers)
    loras.attach_fast(pipe, fast)
    resident.fast = fast
    pipe.set_progress_bar_config(disable=True)
    return pipe, attached


def load_text_encoder(resident: Resident, model: str) -> torch.nn.Module:
    """Load the text encoder that a resident's pipeline does without; its file's weights stay as the plan says."""
    part, given = resident.part("text_encoder"), {}
    if part is not None:
        given = {"dtype": getattr(torch, part.dtype), "keep_quantized": part.kept}
    return loading.load_text_encoder(model, files=resident.options.files, **given)


def weights_of(resident: Resident, model: str) -> dict[str, Any]:
    """Hash what a loaded model was read from, and name what else decides how it rounds."""
    identity = getattr(resident.pipe, "text_encoder_identity", None) or ""
    source = identity if "@" in identity else zoo.public_name(model)  # of a Hub model its id and revision
    weights = loras.hashes(source, local_folder(model), resident.acting_loras, files_of(model, resident.options))
    part = resident.part("transformer") or resident.part("transformer_2")
    if part is not None and part.storage in ("fp8", "int8") and not part.kept:
        weights["model"]["storage"] = part.storage
    if resident.plan is not None and resident.plan.computes_all:
        weights["model"]["computes_all"] = True
    if resident.plan is not None and resident.plan.compile:
        weights["model"]["compiled"] = True
    if resident.plan is not None and resident.plan.attention:
        weights["model"]["attention"] = resident.plan.attention
    for name, entry in weights.get("parts", {}).items():
        if (how := resident.part(name)) is not None and how.kept:
            entry["kept"] = how.storage
    return weights
