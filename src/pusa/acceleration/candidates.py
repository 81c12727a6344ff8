"""List the ways in which a model can run on a machine's cards, and compute what each of them needs.

A candidate does not know how much memory there is: `pusa.acceleration.planning` compares it with the machine. So more
memory only ever adds to what fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

from pusa.acceleration import speed
from pusa.acceleration.decisions import LoadOptions, Machine, Offload, Parallel, PartPlan, Plan, Storage
from pusa.acceleration.needs import ModelShapes
from pusa.defaults import ClipSize
from pusa.resources import LARGE_PARAMETERS, readable

TextPlace = Literal["stay", "prompt", "turns", "leaves", "cpu"]

PROCESS_BYTES = 2 * 10**9  # of RAM: Python, torch, CUDA's libraries, the tensors that are being read
OFFLOADS: tuple[Offload, ...] = ("none", "model", "blocks", "leaves", "disk")
_TEXT_PLACES: tuple[TextPlace, ...] = ("stay", "prompt", "turns", "leaves", "cpu")  # the quickest first
_QUANTISED = ("fp8", "int8")
_FP32_COPIES = 3  # of one weight, while a LoRA is merged into it
_DEQUANTISING_BYTES = 10  # a weight that is computed in fp32 from its file's values, and rounded
_FRAME_BYTES = 50_000_000  # decoded frames on their way to the file


@dataclass(frozen=True)
class Task:
    """A model, a clip and a machine.

    Attributes:
        name: the model's.
        steps: of a video, to share out what happens once per video.
        still_frames: latent frames whose keys and values are stored between steps.
    """

    name: str
    shapes: ModelShapes
    size: ClipSize
    machine: Machine
    options: LoadOptions
    guidance: bool
    steps: int
    is_native: bool = False  # a small model of our own recipe, trained in bf16
    still_frames: int = 0

    @cached_property
    def capability(self) -> tuple[int, int]:
        return min(card.capability or (0, 0) for card in self.machine.cards)

    @property
    def is_small(self) -> bool:
        return self.shapes.parameters < LARGE_PARAMETERS

    @cached_property
    def dtype(self) -> Literal["bfloat16", "float32"]:
        """Dtype of transformers and VAE."""
        in_fp32 = self.is_small and (not self.is_native or self.capability < (8, 0))
        return "float32" if in_fp32 else "bfloat16"

    @cached_property
    def text_dtype(self) -> Literal["bfloat16", "float32"]:
        return "float32" if self.is_small else "bfloat16"

    @cached_property
    def flops(self) -> tuple[float, float]:
        return self.shapes.transformer.flops(self.size)

    def stored_frames_bytes(self, parallel: Parallel | None = None, dtype: str | None = None) -> int:
        """Compute the bytes of the keys and values on a card; ranks that share the tokens store none."""
        parallel = parallel or Parallel()
        if parallel.ulysses * parallel.ring > 1:
            return 0
        passes = 2 if self.guidance and parallel.guidance == 1 else 1
        return (
            passes
            * self.still_frames
            * self.shapes.transformer.stored_frame_bytes(self.size, dtype=dtype or self.dtype)
        )

    @cached_property
    def vae_bytes(self) -> dict[bool, tuple[int, int]]:
        """Most that the VAE holds beside its weights to encode and to decode, in whole frames and in tiles (True)."""
        vae, pixels, frames = self.shapes.vae, (self.size.height, self.size.width), self.size.num_frames
        whole = vae.encode_bytes(*pixels, frames, self.dtype), vae.decode_bytes(*pixels, self.dtype)
        tiles = [need(*pixels, frames, self.dtype) for need in (vae.tiled_encode_bytes, vae.tiled_decode_bytes)]
        return {False: whole, True: (tiles[0], tiles[1])}

    @cached_property
    def storage_of_file(self) -> dict[str, Storage]:
        """Storage of the transformers whose single files are quantised and may stay so."""
        return {part: storage for part, storage in self._quantised_files.items() if part in self.shapes.experts}

    @cached_property
    def text_storage(self) -> Storage:
        """Storage of the text encoder: its file's own, which costs no time worth mentioning."""
        return self._quantised_files.get("text_encoder", self.text_dtype)

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of the text encoder's weights."""
        is_kept = "text_encoder" in self._quantised_files
        size = self.options.file_bytes.get("text_encoder", 0) if is_kept else 0
        return size or self.shapes.text_encoder.weight_bytes(self.text_dtype)

    @cached_property
    def _quantised_files(self) -> dict[str, Storage]:
        """Storage of the parts that may stay as their files store them, if they are quantised."""
        if self.is_small or self.options.quantize == "none":
            return {}
        by_name = {part: _storage_by_name(path) for part, path in self.options.files.items()}
        stored = {**by_name, **self.options.file_storage}
        return {part: storage for part, storage in stored.items() if storage in (*_QUANTISED, "gguf")}

    def dequantised(self) -> "Task":
        """Return the same task with all files' weights converted to full ones."""
        return replace(self, options=replace(self.options, quantize="none"))


def _storage_by_name(path: Path) -> Storage:
    return "gguf" if path.suffix.lower() == ".gguf" else "bfloat16"


@dataclass(frozen=True)
class Candidate:
    """One way to run a model on cards.

    Attributes:
        storage: of the transformers' weights, but for those that are kept as files store them.
        text: where the text encoder runs.
        is_apart: the two experts have a card each.
        keeps: transformers whose files are quantised stay as those store them; False: they become full weights.
        in_8_bits: layers multiply in 8 bits if the wish is "fastest".
    """

    task: Task
    storage: Storage
    offload: Offload
    merge: bool
    tiles: bool
    text: TextPlace
    parallel: Parallel = field(default_factory=Parallel)
    is_apart: bool = False
    keeps: bool = False
    in_8_bits: bool = True

    @property
    def cards(self) -> int:
        return self.parallel.ranks * (2 if self.is_apart else 1)

    @property
    def is_exact(self) -> bool:
        return self.storage not in _QUANTISED

    @property
    def discomfort(self) -> tuple[int, ...]:
        """Order candidates of one speed."""
        weights = self.storage != "bfloat16" or self.keeps, self.storage == "fp8", OFFLOADS.index(self.offload)
        return (*weights, self.parallel.shard, self.cards, self.tiles, _TEXT_PLACES.index(self.text))

    @property
    def has_adapter(self) -> bool:
        """Tell if LoRAs are attached and not merged."""
        return not self.merge and any(self.task.shapes.lora_ranks.values())

    @property
    def kept(self) -> dict[str, Storage]:
        """Storage of the transformers that stay as their files store them."""
        return self.task.storage_of_file if self.keeps else {}

    def storage_of(self, expert: str) -> Storage:
        return self.kept.get(expert, self.storage)

    # ---- bytes ----

    def _weights(self, expert: str) -> int:
        shape, storage = self.task.shapes.transformer, self.storage_of(expert)
        size = shape.weight_bytes(storage, self._file_bytes(expert))
        if self.is_fast and storage in _QUANTISED:  # see `pusa.acceleration.quantization.ends_of`
            size += 2 * (shape.block_bytes("bfloat16") - shape.block_bytes(storage))
        return size + (0 if self.merge else self.task.shapes.lora_bytes(expert))

    def _file_bytes(self, expert: str) -> int:
        return self.task.options.file_bytes.get(expert, 0) if expert in self.kept else 0

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of each expert, with its LoRA where that is not merged."""
        return {expert: self._weights(expert) for expert in self.task.shapes.experts}

    def _block(self, expert: str) -> int:
        shape = self.task.shapes.transformer
        lora = 0 if self.merge else self.task.shapes.lora_bytes(expert) // shape.layers
        return shape.block_bytes(self.storage_of(expert), self._file_bytes(expert)) + lora

    @property
    def _resident(self) -> int:
        """Weights on a card, whatever happens there."""
        if self.offload != "none":
            return 0
        size = max(self.weights.values()) if self.is_apart else sum(self.weights.values())
        return -(-size // self.parallel.ranks) if self.parallel.shard else size

    @property
    def _denoising(self) -> int:
        """Weights on a card while the transformer computes."""
        shape = self.task.shapes.transformer
        block = max(self._block(expert) for expert in self.task.shapes.experts)
        others = shape.other_bytes(self.storage)
        layer = 2 * shape.largest_layer  # of weights that are cast to bf16, one layer at a time
        size = {
            "none": self._resident + (2 * block if self.parallel.shard else 0),
            "model": max(self.weights.values()),
            "blocks": others + 2 * block,
            "disk": others + 2 * block,
            "leaves": others + 2 * layer,
        }[self.offload]
        if self.kept:
            return size + _DEQUANTISING_BYTES * shape.largest_layer
        return size + (layer if self.storage in _QUANTISED else 0)

    @cached_property
    def gpu_peak_bytes(self) -> dict[str, int]:
        """The most on any card, by stage."""
        shapes, size = self.task.shapes, self.task.size
        dtype, text_dtype = self.task.dtype, self.task.text_dtype
        text = self.task.text_bytes
        stays = text if self.text == "stay" else 0
        vae = 0 if self.offload == "model" else shapes.vae.weight_bytes(dtype)
        resident = self._resident + vae + stays
        to_encode = {
            "cpu": 0,
            "leaves": shapes.text_encoder.streamed_bytes(text_dtype),
            "stay": 0,
        }.get(self.text, text) + shapes.text_encoder.activation_bytes() * (self.text != "cpu")
        vae_at_work = shapes.vae.weight_bytes(dtype) - vae
        encode, decode = self.task.vae_bytes[self.tiles]
        tokens = -(-shapes.transformer.tokens(size) // (self.parallel.ulysses * self.parallel.ring))
        activations = shapes.transformer.activation_bytes(
            tokens,
            dtype=dtype,
            adapters=self.has_adapter,
            quantised=self.storage in _QUANTISED and self.is_fast,
        )
        peaks = {
            "encode": resident + max(to_encode, vae_at_work + encode),
            "denoise": self._denoising
            + (vae + stays + activations + shapes.latent_bytes)
            + self.task.stored_frames_bytes(self.parallel),
            "decode": resident + vae_at_work + decode + min(_FRAME_BYTES, decode),
        }
        if self.merge and all(map(self._is_read_to_card, shapes.experts)):
            loras = list(map(shapes.lora_bytes, shapes.experts))
            merging = _FP32_COPIES * 4 * shapes.transformer.largest_layer
            peaks["load"] = self._resident + vae + (max(loras) if self.is_apart else sum(loras)) + merging
        return peaks

    def _is_read_as_fp8(self, expert: str) -> bool:
        """Tell if weights are rounded as they are read: see `pusa.acceleration.placement.parts_read_as_fp8`."""
        multiplies = self.task.options.memory == "fastest" and self.in_8_bits
        return self.storage_of(expert) == "fp8" and not multiplies and expert not in self.kept

    def _is_read_to_card(self, expert: str) -> bool:
        """Tell if weights go from their file to the card: see `pusa.acceleration.placement.devices_to_load`."""
        if self.offload != "none" or self.parallel.shard or expert in self.task.storage_of_file:
            return False
        return self.is_exact or self._is_read_as_fp8(expert)

    def _bytes_to_load(self, expert: str) -> int:
        """Compute the most of an expert that is in RAM while it is loaded, with its LoRA."""
        shape, storage = self.task.shapes.transformer, self.storage_of(expert)
        lora = self.task.shapes.lora_bytes(expert)
        if self._is_read_to_card(expert):
            return lora
        if storage in _QUANTISED and not self._is_read_as_fp8(expert):
            storage = "bfloat16"  # they are made of it, when LoRAs are merged
        return shape.weight_bytes(storage, self.task.options.file_bytes.get(expert, 0)) + lora

    @cached_property
    def peak_bytes(self) -> int:
        return max(self.gpu_peak_bytes.values())

    @cached_property
    def ram_peak_bytes(self) -> int:
        """The most in the RAM of the machine, in all ranks: while the model is loaded, or afterwards."""
        shapes = self.task.shapes
        loaded = sum(map(self._bytes_to_load, shapes.experts))
        kept = sum(map(shapes.lora_bytes, shapes.experts)) if self.merge else 0  # matrices, for another alpha
        if self.offload in ("model", "blocks", "leaves"):
            kept += sum(self.weights.values())
        elif self.offload == "none":
            kept += sum(self.weights[expert] for expert in self.kept)  # read before they move
        if self.offload == "model":
            kept += shapes.vae.weight_bytes(self.task.dtype)
            loaded += shapes.vae.weight_bytes(self.task.dtype)
        text = self.task.text_bytes if self.text in ("turns", "leaves", "cpu") else 0
        process = min(PROCESS_BYTES, PROCESS_BYTES // 2 + 2 * shapes.parameters)
        ranks = self.parallel.ranks
        return max(ranks * (process + loaded), ranks * (process + kept) + text)

    @property
    def disk_bytes(self) -> int:
        """Weights that are written to disk."""
        return sum(self.weights.values()) if self.offload == "disk" else 0

    # ---- speed ----

    @property
    def is_fast(self) -> bool:
        """Tell if layers multiply in 8 bits, which changes results more than the rounding of weights."""
        is_fastest = self.task.options.memory == "fastest"
        return is_fastest and self.in_8_bits and not self.has_adapter and not self.kept

    @cached_property
    def relative_speed(self) -> float:
        task, parallel = self.task, self.parallel
        linear, attention = task.flops
        moved = max(self.weights.values())
        swaps = 2 * len(self.weights) if self.offload == "model" else 0
        work = speed.Work(
            linear,
            attention,
            streamed_bytes=moved if self.offload in ("blocks", "leaves", "disk") else 0,
            from_disk=self.offload == "disk",
            by_leaf=self.offload == "leaves",
            gathered_bytes=moved * (parallel.ranks - 1) // parallel.ranks if parallel.shard else 0,
            swapped_bytes=swaps * moved,
            passes=task.steps * (2 if task.guidance and parallel.guidance == 1 else 1),
            sequence=parallel.ulysses * parallel.ring,
            guidance=parallel.guidance,
        )
        storage = next(iter(self.kept.values()), self.storage)
        return speed.relative_speed(
            work, task.machine, task.capability, storage, merged=not self.has_adapter, in_8_bits=self.is_fast
        )

    # ---- the plan ----

    def plan(self, *, notes: tuple[str, ...] = ()) -> Plan:
        """Describe this candidate."""
        parts = {expert: self._expert_plan(number, expert) for number, expert in enumerate(self.weights)}
        return Plan(
            model=self.task.name,
            wish=self.task.options.memory,
            parts={
                **parts,
                **({"text_encoder": self._text_plan()} if self.task.text_bytes else {}),
                "vae": self._vae_plan(),
            },
            merge=self.merge,
            parallel=self.parallel,
            gpu_peak_bytes=self.gpu_peak_bytes,
            ram_peak_bytes=self.ram_peak_bytes,
            relative_speed=round(self.relative_speed, 4),
            notes=(*self._notes(), *notes),
            in_8_bits=self.in_8_bits,
        )

    def _expert_plan(self, number: int, expert: str) -> PartPlan:
        storage, size = self.storage_of(expert), readable(self.weights[expert])
        shared = f", 1/{self.parallel.ranks} on each card" if self.parallel.shard else ""
        limit = "" if self.relative_speed > 0.95 or self.parallel.ranks > 1 else ", which limits the speed"
        reason = {
            "none": f"its {size} stay on {'a card of its own' if self.is_apart else 'the card'}{shared}",
            "model": f"its {size} take turns on the card with the other parts",
            "blocks": f"its {size} stay in RAM: the next block is copied while one computes{limit}",
            "leaves": f"its {size} stay in RAM and are copied layer by layer{limit}",
            "disk": f"its {size} stay on disk, block by block, for lack of RAM{limit}",
        }[self.offload]
        if expert in self.kept:
            reason += f"; they stay as {storage}, as its file has them"
        elif storage in _QUANTISED:
            reason += f"; {storage} rounds its weights" + (" and multiplies in 8 bits" if self.is_fast else "")
        return PartPlan(
            self.task.dtype,
            storage,
            "cuda",
            self.offload,
            card=number * self.is_apart,
            reason=reason,
            kept=expert in self.kept,
        )

    def _text_plan(self) -> PartPlan:
        dtype, storage = self.task.text_dtype, self.task.text_storage
        size = readable(self.task.text_bytes)
        part = PartPlan(dtype, storage, "cuda", when="prompt", kept=storage != dtype)
        if self.text == "stay":
            return replace(part, when="stay", reason=f"its {size} fit beside the rest")
        if self.text == "prompt":
            return replace(part, reason=f"its {size} are on the card for a new prompt only")
        if self.text == "turns":
            return replace(part, offload="model", reason=f"its {size} take the transformer's place for a new prompt")
        if self.text == "leaves":
            return replace(part, offload="leaves", reason=f"its {size} are too large for the card: layer by layer")
        return replace(part, device="cpu", reason="the card has no room for its largest layer")

    def _vae_plan(self) -> PartPlan:
        dtype = self.task.dtype
        decode = readable(self.gpu_peak_bytes["decode"])
        reason = f"decoding in {'tiles' if self.tiles else 'whole frames'} holds {decode}"
        offload: Offload = "model" if self.offload == "model" else "none"
        return PartPlan(dtype, dtype, "cuda", offload, tiles=self.tiles, reason=reason)

    def _notes(self) -> Iterator[str]:
        if self.merge and not self.is_exact and not all(map(self._is_read_as_fp8, self.weights)):
            yield f"alpha is frozen: LoRAs are merged before rounding to {self.storage}; another alpha loads anew"
        elif self.merge:
            yield "LoRAs are merged: another alpha merges again from the untouched weights"
        if self.task.capability < (8, 0) and self.task.dtype == "bfloat16":
            yield "this card emulates bf16: expect it to be slower than the figure"
        if self.parallel.reason:
            yield self.parallel.reason


def candidates(task: Task) -> Iterator[Candidate]:
    """List all ways to run a task on cards, in no order."""
    offloads = OFFLOADS
    if task.is_small:
        offloads = ("none",)
    has_lora = any(task.shapes.lora_ranks.values())
    for (parallel, is_apart), (storage, keeps), offload in product(_groups(task), _storages(task), offloads):
        merge = has_lora and not task.is_small and not keeps
        if (is_apart or parallel.shard) and offload != "none":
            continue
        kept = set(task.storage_of_file.values()) if keeps else set()
        if offload == "disk" and ("int8" in (storage, *kept) or "fp8" in kept):  # diffusers cannot write them to disk
            continue
        if task.storage_of_file and not keeps and offload != "none" and task.options.memory != "fastest":
            continue  # files that are quantised for the sake of memory grow only where they fit the card
        if parallel.shard and (storage in _QUANTISED or keeps):
            continue
        for text, tiles in product(_TEXT_PLACES, (False, True)):
            if text == ("prompt" if offload == "model" else "turns"):
                continue
            if text == "stay" and (offload != "none" or is_apart):
                continue
            way = Candidate(task, storage, offload, merge, tiles, text, parallel, is_apart, keeps)
            yield way
            if storage == "fp8" and task.options.memory == "fastest" and not keeps:
                yield replace(way, in_8_bits=False)  # slower, and read as fp8


def _storages(task: Task) -> list[tuple[Storage, bool]]:
    """List storages of transformers, and if those whose files are quantised are kept so."""
    exact: Storage = "bfloat16"
    if task.is_small:
        return [(exact if task.is_native and task.capability >= (8, 0) else "float32", False)]
    quantize, keeps = task.options.quantize, bool(task.storage_of_file)
    multiplies_int8 = (7, 5) <= task.capability < (8, 9)
    others: tuple[Storage, ...] = (exact, "int8", "fp8") if multiplies_int8 else (exact, "fp8")
    if quantize == "none" or task.storage_of_file.keys() == set(task.shapes.experts):
        others = (exact,)
    elif quantize != "auto":
        others = (quantize,)
    dequantised = [(exact, False)] if keeps and quantize == "auto" else []
    return [*((storage, keeps) for storage in others), *dequantised]


def _groups(task: Task) -> Iterator[tuple[Parallel, bool]]:
    """List the ways to share out cards: ranks, and whether each rank has a card for each expert."""
    if task.is_small:
        yield Parallel(), False
        return
    count = task.options.gpus or len(task.machine.cards)
    is_fixed = task.options.gpus is not None
    for ranks in range(1, count + 1):
        degrees = _degrees(task, ranks)
        if degrees is None:
            continue
        for is_apart in (False, True) if len(task.shapes.experts) == 2 else (False,):
            used = ranks * (1 + is_apart)
            if used > count or (is_fixed and used != count):
                continue
            yield degrees, is_apart
        if ranks > 1 and (not is_fixed or ranks == count):
            reason = f"each card holds 1/{ranks} of the weights and gathers a block before it computes"
            yield replace(degrees, shard=True, reason=reason), False


def _degrees(task: Task, ranks: int) -> Parallel | None:
    """Divide ranks into the two passes of guidance and slices of the tokens; None where they cannot be."""
    divided, transformer = Parallel.divide(ranks, guided=task.guidance), task.shapes.transformer
    if divided.ulysses > 1 and (not transformer.shares_tokens or transformer.heads % divided.ulysses):
        return None
    reasons = []
    if divided.guidance == 2:
        reasons.append("the two passes of guidance run at once")
    if divided.ulysses > 1:
        reasons.append(f"{divided.ulysses} cards share the tokens of a pass")
    return replace(divided, reason="; ".join(reasons))
