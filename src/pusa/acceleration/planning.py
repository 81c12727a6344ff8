"""Plan how a model makes a clip on a machine: from shapes and numbers alone, without torch and without measuring.

`plans` lists what fits, best first. Every next plan needs less GPU memory than the one before, so that a run which is
out of memory goes on with the next.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.acceleration import attention
from pusa.acceleration.candidates import PROCESS_BYTES, Candidate, Task, candidates
from pusa.acceleration.decisions import Card, LoadOptions, Machine, PartPlan, Plan
from pusa.acceleration.file_weights import read_files
from pusa.acceleration.needs import Ranks, clip_of, shapes_of
from pusa.acceleration.speed import rate_of
from pusa.defaults import ClipSize
from pusa.lora.sources import EXPERTS
from pusa.positions import nearest_of
from pusa.resources import GB, readable, readable_time

if TYPE_CHECKING:
    from pusa.zoo import ZooModel

_HALF = 0.48  # of the speed that exact weights would have without limits; a little less than half is still half
_STEP = 0.97  # a fallback needs at most this part of the plan before it

COMPILING = "compiled: the first step of a new size takes a minute or two longer, once, as its code stays on disk"

Size = ClipSize | tuple[int, int, int]


def usable_bytes(card: Card) -> int:
    """Compute what a plan may use of a card: the rest is for kernels' workspaces and gaps between allocations."""
    return max(round(0.94 * card.memory_bytes - 0.4e9), 0)


def plan(
    model: "str | ZooModel",
    *,
    size: Size | None = None,
    machine: Machine,
    options: LoadOptions | None = None,
    guidance: bool | float = True,
    lora_ranks: Ranks = None,
) -> Plan:
    """Choose how a model makes a clip on a machine.

    Args:
        model: an entry of the zoo, a source that `pusa.zoo.find` knows, or a folder in diffusers layout, whose
            configurations are read; others are taken for Wan2.1 14B.
        size: width, height and frames; None: the model's own. Of a long video, those of one window.
        machine: what is free there; see `pusa.acceleration.machine`.
        options: what the user asks for; None: the default.
        guidance: if each step makes a second pass, for classifier-free guidance; or its scale, where 1 is without.
        lora_ranks: expert -> sum of the ranks of its LoRAs, or the rank of each LoRA; None: those of the model's own
            Pusa LoRA.

    Returns:
        The first of `plans`. Where nothing fits, its `problem` has need, supply and a way out.

    Raises:
        ValueError: a size below 1.
    """
    return plans(model, size=size, machine=machine, options=options, guidance=guidance, lora_ranks=lora_ranks)[0]


def plans(
    model: "str | ZooModel",
    *,
    size: Size | None = None,
    machine: Machine,
    options: LoadOptions | None = None,
    guidance: bool | float = True,
    lora_ranks: Ranks = None,
    still_frames: int = 0,
) -> list[Plan]:
    """List plans that fit, the best by the user's wish first, each next one with less GPU memory; arguments as `plan`.

    Args:
        still_frames: latent frames that do not change while others do, whose keys and values are stored where a plan
            that does so is as fast as one that computes every frame at every step.

    Returns:
        At least one plan; where nothing fits, one with a `problem`.
    """
    model = _model_of(model) if isinstance(model, str) else model
    shapes = shapes_of(model, lora_ranks)
    options = read_files(options or LoadOptions(), model.files)
    task = Task(
        name=model.name,
        shapes=shapes,
        size=clip_of(model, shapes, size),
        machine=replace(machine, cards=tuple(card for card in machine.cards if card.capability is not None)),
        options=options,
        guidance=guidance if isinstance(guidance, bool) else guidance > 1,
        steps=model.defaults.steps,
        is_native=model.folder is not None,
        still_frames=still_frames,
    )
    found = _plans_of(task)
    if still_frames and shapes.transformer.stores_frames:
        found = _storing_or_computing(task, found)
        task = replace(task, still_frames=0)
    if found[0].problem:
        words, out = _way_out(
            task, lambda smaller: not _plans_of(replace(task, size=clip_of(model, shapes, smaller)))[0].problem
        )
        values = {**found[0].problem_values, **out}
        found = [replace(found[0], problem=f"{found[0].problem}: {words}", problem_values=values)]
    capability = min((card.capability for card in task.machine.cards if card.capability), default=None)
    kinds = {"has_loras": any(shapes.lora_ranks.values()), "is_small": task.is_small}
    return [
        with_kernels(plan, options, capability, can_compile_decoder=_has_room_to_decode(plan, task), **kinds)
        for plan in found
    ]


def _has_room_to_decode(plan: Plan, task: Task) -> bool:
    """Tell if a second copy of what the decoder keeps of earlier frames fits, which a compiled one holds."""
    if plan.problem:
        return False
    copy = task.shapes.vae.cache_bytes(task.size.height, task.size.width, plan.parts["vae"].dtype)
    peak = plan.gpu_peak_bytes.get("decode", plan.ram_peak_bytes)
    rooms = [usable_bytes(card) for card in task.machine.cards] if plan.gpu_peak_bytes else [task.machine.ram_bytes]
    return peak + copy <= min(rooms)


def with_kernels(
    plan: Plan,
    options: LoadOptions,
    capability: tuple[int, int] | None,
    *,
    has_loras: bool,
    is_small: bool = False,
    can_compile_decoder: bool = True,
) -> Plan:
    """Add to a plan what computes attention, and if the transformers are compiled.

    LoRAs are merged then: beside the weights they cost as much as compiling gains, and another alpha merges again.

    Args:
        capability: the cards' least one; None: the plan is for the CPU.
        is_small: the model gains nothing by another attention than torch's own.
        can_compile_decoder: there is memory for it.

    Raises:
        ValueError: the attention that is asked for does not run there, or is not installed.
    """
    if plan.problem:
        return plan
    notes = list(plan.notes)
    word = attention.choose(
        capability,
        asked=options.attention,
        dtype="float32" if is_small else "bfloat16",
        shares_tokens=plan.parallel.ulysses * plan.parallel.ring > 1,
    )
    is_open = options.attention == "auto" and (word == "native" or attention.is_chosen_by_environment())
    if not is_open:
        notes.append(attention.describe(word))
    wants = options.compile == "always" or (options.compile == "auto" and capability is not None)
    obstacle = _obstacle_to_compile(plan) if wants else ""
    if wants:
        notes.append(f"not compiled, as {obstacle}" if obstacle else COMPILING)
    compiles = wants and not obstacle
    is_full = all(part.storage == part.dtype for name, part in plan.parts.items() if name in EXPERTS)
    merge = plan.merge or (compiles and has_loras and is_full)
    vae = plan.parts.get("vae")  # layers with hooks of their own cannot be compiled; tiles have many sizes
    is_whole = vae is not None and vae.offload in ("none", "model") and not vae.tiles
    return replace(
        plan,
        attention="" if is_open else word,
        compile=compiles,
        compile_decoder=compiles and is_whole and can_compile_decoder,
        merge=merge,
        notes=tuple(notes),
    )


def _obstacle_to_compile(plan: Plan) -> str:
    """Say why the transformers cannot be compiled where a plan has them; empty if they can."""
    parts = [part for name, part in plan.parts.items() if name in EXPERTS]
    if any(part.offload == "leaves" for part in parts):
        return "its layers are streamed one by one"
    if any(part.storage == "gguf" for part in parts):
        return "its weights stay as GGUF has them"
    if any(part.storage == "fp8" for part in parts) and not plan.is_fast:
        return "its weights are fp8 and become full layer by layer"
    if plan.parallel.shard or plan.parallel.ulysses * plan.parallel.ring > 1:
        return "cards share its weights or its tokens"
    return ""


def _model_of(source: str) -> "ZooModel":
    from pusa import zoo

    known = zoo.find(zoo.with_fallback(source)) or zoo.in_folder(Path(source).expanduser())
    return known or zoo.get("wan2.1-14b")


def _plans_of(task: Task) -> list[Plan]:
    cards = task.machine.cards
    if not task.is_small and (task.options.gpus or 0) > max(len(cards), 1):  # one is the CPU where there is no card
        return [_problem(task, "cards", f"gpus={task.options.gpus}, and usable cards here: {len(cards)}")]
    if not cards:
        return [_plan_for_cpu(task)]
    all_ways = list(candidates(task))
    if not all_ways:
        shape = task.shapes.transformer
        why = f"it has {shape.heads} attention heads" if shape.shares_tokens else "only guidance's passes are"
        return [_problem(task, "cards", f"{task.name} cannot be shared by {task.options.gpus} cards ({why})")]
    fitting = [way for way in all_ways if _fits(way)]
    if not fitting:
        return [_shortage(all_ways)]
    chosen: list[Candidate] = []
    for way in sorted(fitting, key=_order(task, all_ways, fitting)):
        if not chosen or way.peak_bytes <= _STEP * chosen[-1].peak_bytes:
            chosen.append(way)
    return [way.plan(notes=_notes(task)) for way in chosen]


def _storing_or_computing(task: Task, storing: list[Plan]) -> list[Plan]:
    """Choose between plans that store frames and those that compute every frame, which take over from them if smaller.

    All that store them make the same video, to the bit.
    """
    others = _plans_of(replace(task, still_frames=0))
    note = (
        f"every frame is computed at every step: no room for the keys and values of {task.still_frames} latent "
        f"frames that are kept ({readable(task.stored_frames_bytes())})"
    )
    computing = [replace(plan, computes_all=True, notes=(*plan.notes, note)) for plan in others if not plan.problem]
    if storing[0].problem or storing[0].relative_speed < others[0].relative_speed:
        return computing or others
    return storing + [plan for plan in computing if plan.peak_bytes <= _STEP * storing[-1].peak_bytes]


def _fits(way: Candidate) -> bool:
    machine = way.task.machine
    return (
        way.peak_bytes <= min(map(usable_bytes, machine.cards[: way.cards]))
        and way.ram_peak_bytes <= machine.ram_bytes
        and way.disk_bytes <= machine.disk_bytes
    )


def _order(task: Task, ways: list[Candidate], fitting: list[Candidate]) -> Callable[[Candidate], Any]:
    """Return the sort key of a wish."""
    if task.options.memory == "fastest":
        return lambda way: (-way.relative_speed, way.discomfort)
    if task.options.memory == "smallest":
        return lambda way: (way.peak_bytes, -way.relative_speed, way.discomfort)
    unlimited: dict[int, float] = {}  # ranks -> the speed of exact weights there if memory were no limit
    for way in ways:
        if way.is_exact:
            unlimited[way.parallel.ranks] = max(way.relative_speed, unlimited.get(way.parallel.ranks, 0.0))
    best_exact = max((way.relative_speed for way in fitting if way.is_exact and way.offload != "disk"), default=0.0)

    def rank(way: Candidate) -> int:
        """Prefer exact weights unless lack of RAM or a slow bus takes more than half the speed; the disk comes last."""
        is_half = way.relative_speed >= _HALF * unlimited.get(way.parallel.ranks, 0.0)
        if way.is_exact and is_half and way.offload != "disk":
            # Two experts on two cards: one each is simpler, and fits wherever halves of both do.
            return int(way.parallel.shard and len(way.weights) == 2 and way.parallel.ranks == 2)
        if not way.is_exact and way.offload != "disk" and way.relative_speed > best_exact:
            return 2
        if way.is_exact and (is_half or way.offload != "disk"):
            return 3
        return 4 if way.offload == "disk" else 5

    return lambda way: (rank(way), -way.relative_speed, way.discomfort)


# ---- without a card --------------------------------------------------------------------------------------------------


def _plan_for_cpu(task: Task) -> Plan:
    """Plan for a machine without a usable card: everything stays as it is loaded.

    Files that are quantised become full weights, which are faster, unless RAM is short or the user wants fewer bits.
    """
    if task.options.quantize == "auto":
        full = _plan_in_ram(task.dequantised())
        if not full.problem:
            return full
    return _plan_in_ram(task)


def _plan_in_ram(task: Task) -> Plan:
    shapes, is_bf16 = task.shapes, not task.is_small or (task.is_native and task.machine.cpu_has_bf16)
    dtype: Any = "bfloat16" if is_bf16 else "float32"
    large_dtypes: dict[str, Any] = {"text_encoder": dtype, "vae": "float32"}
    dtypes = large_dtypes if not task.is_small else {"text_encoder": "float32", "vae": dtype}
    kept, file_bytes = task.storage_of_file, task.options.file_bytes
    weights = {
        expert: shapes.transformer.weight_bytes(kept.get(expert, dtype), file_bytes.get(expert, 0) * (expert in kept))
        for expert in shapes.experts
    }
    loras = sum(map(shapes.lora_bytes, shapes.experts))
    vae = shapes.vae.weight_bytes(dtypes["vae"])
    text = task.text_bytes
    size = task.size
    activations = shapes.transformer.activation_bytes(
        shapes.transformer.tokens(size), dtype=dtype, adapters=loras > 0 and task.is_small
    )
    activations += task.stored_frames_bytes(dtype=dtype)
    resident = min(PROCESS_BYTES // 2, 10**9) + sum(weights.values()) + loras + vae
    encode = text + shapes.text_encoder.activation_bytes()
    decodes = {
        False: shapes.vae.decode_bytes(size.height, size.width, dtypes["vae"]),
        True: shapes.vae.tiled_decode_bytes(size.height, size.width, size.num_frames, dtypes["vae"]),
    }
    peaks = {tiles: resident + max(encode, activations + shapes.latent_bytes, decodes[tiles]) for tiles in decodes}
    tiles = peaks[False] > task.machine.ram_bytes and peaks[True] < peaks[False]
    if peaks[tiles] > task.machine.ram_bytes:
        return _problem(
            task,
            "ram",
            f"{task.name} needs {readable(peaks[tiles])} of RAM for {_readable_size(task)} without a GPU, and "
            f"{readable(task.machine.ram_bytes)} is free",
            (peaks[tiles], task.machine.ram_bytes),
        )
    where = "there is no GPU" if not task.is_small else "small enough for the CPU"
    parts = {
        expert: PartPlan(
            dtype,
            kept.get(expert, dtype),
            "cpu",
            reason=f"{where}: {readable(weights[expert])}" + (", as its file has them" if expert in kept else ""),
            kept=expert in kept,
        )
        for expert in weights
    }
    if text:
        parts["text_encoder"] = PartPlan(
            dtypes["text_encoder"],
            task.text_storage,
            "cpu",
            when="stay" if task.is_small else "prompt",
            reason=f"{readable(text)}" + ("" if task.is_small else ", for a new prompt only"),
            kept=task.text_storage != dtypes["text_encoder"],
        )
    parts["vae"] = PartPlan(
        dtypes["vae"], dtypes["vae"], "cpu", tiles=tiles, reason=f"decoding holds {readable(decodes[tiles])}"
    )
    notes = [] if task.is_small else [f"very slow: {readable_time(_seconds_on_cpu(task))} for a video, roughly"]
    return Plan(
        model=task.name,
        wish=task.options.memory,
        parts=parts,
        merge=loras > 0 and not task.is_small and not kept,
        ram_peak_bytes=peaks[tiles],
        notes=tuple(notes),
    )


def _seconds_on_cpu(task: Task) -> float:
    operations = sum(task.shapes.transformer.flops(task.size))
    return task.steps * (2 if task.guidance else 1) * operations / rate_of(None)


# ---- where nothing fits ----------------------------------------------------------------------------------------------


def _problem(task: Task, lacks: str, reason: str, bytes_of: tuple[float, float] | None = None) -> Plan:
    """Return the plan of what cannot be; `bytes_of` are those that it needs and has of what it lacks."""
    values: dict[str, Any] = {"lacks": lacks}
    if bytes_of is not None:
        values |= {name: round(count / GB, 1) for name, count in zip(("needs", "has"), bytes_of, strict=True)}
    wish = task.options.memory
    return Plan(model=task.name, wish=wish, parts={}, relative_speed=0.0, problem=reason, problem_values=values)


def _shortage(ways: list[Candidate]) -> Plan:
    """Say which memory is missing, by the candidate that needs the least of it."""
    task = ways[0].task
    machine, clip = task.machine, _readable_size(task)
    on_card = [way for way in ways if way.peak_bytes <= min(map(usable_bytes, machine.cards[: way.cards]))]
    if not on_card:
        least = min(ways, key=lambda way: way.peak_bytes)
        card = min(machine.cards[: least.cards], key=usable_bytes)
        return _problem(
            task,
            "gpu",
            f"{task.name} needs {readable(least.peak_bytes)} of GPU memory for {clip} even with streamed weights, and "
            f"of this card {readable(usable_bytes(card))} can be used",
            (least.peak_bytes, usable_bytes(card)),
        )
    if within_ram := [way for way in on_card if way.ram_peak_bytes <= machine.ram_bytes]:
        least = min(within_ram, key=lambda way: way.disk_bytes)
        return _problem(
            task,
            "disk",
            f"{task.name} needs {readable(least.disk_bytes)} of disk to stream its weights from for {clip}, and "
            f"{readable(machine.disk_bytes)} is free",
            (least.disk_bytes, machine.disk_bytes),
        )
    least = min(on_card, key=lambda way: way.ram_peak_bytes)
    return _problem(
        task,
        "ram",
        f"{task.name} needs {readable(least.ram_peak_bytes)} of RAM for {clip} on this card, and "
        f"{readable(machine.ram_bytes)} is free",
        (least.ram_peak_bytes, machine.ram_bytes),
    )


def _way_out(task: Task, fits: Callable[[tuple[int, int, int]], bool]) -> tuple[str, dict[str, Any]]:
    """Name the first remedy that helps, in words and as values: fewer cards, a size that fits, or else more memory."""
    gpus = task.options.gpus
    if gpus is not None and gpus > 1 and not _possible_counts(task, only=gpus):
        others = ", ".join(map(str, _possible_counts(task)))
        return "leave gpus out" + (f", or take one of {others}" if others else ""), {"way": "gpus"}
    if (
        task.options.quantize == "none"
        and not _plans_of(replace(task, options=replace(task.options, quantize="auto")))[0].problem
    ):
        return "allow quantised weights (quantize=auto)", {"way": "quantize"}
    width, height, frames = task.size.width, task.size.height, task.size.num_frames
    portrait = height > width
    for long, short, count in [(832, 480, frames), (832, 480, 49), (640, 352, 49), (480, 256, 33)]:
        count = nearest_of(min(count, frames), task.shapes.vae.temporal, 1)
        smaller = (short, long, count) if portrait else (long, short, count)
        if smaller[0] * smaller[1] * smaller[2] < width * height * frames and fits(smaller):
            size = f"{smaller[0]}x{smaller[1]}"
            return f"{size} with {smaller[2]} frames fits", {"way": "smaller", "size": size, "frames": smaller[2]}
    return "close other programs, add memory, or take a smaller model", {"way": "memory"}


def _possible_counts(task: Task, only: int | None = None) -> list[int]:
    counts = [n for n in range(1, len(task.machine.cards) + 1) if only in (None, n)]
    return [n for n in counts if list(candidates(replace(task, options=replace(task.options, gpus=n))))]


def _readable_size(task: Task) -> str:
    return f"{task.size.width}x{task.size.height} and {task.size.num_frames} frames"


def _notes(task: Task) -> tuple[str, ...]:
    others = [storage for storage in task.storage_of_file.values() if storage != task.options.quantize]
    if others and task.options.quantize in ("fp8", "int8"):
        return (f"quantize={task.options.quantize} has no effect on a file in {others[0]}, which stays as it is",)
    return ()
