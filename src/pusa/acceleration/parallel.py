"""Share the denoising steps of a pipeline among ranks.

The two passes of classifier-free guidance run on two groups of ranks, which exchange one velocity per step; within a
group the tokens are divided by Ulysses or ring attention; and the weights may be divided among all ranks. Rank 0 sends
what the transformer reads at each step, so that all ranks compute the same video, and only rank 0 needs prompts,
conditions, a text encoder and a VAE.

    pipe = PusaPipeline.from_pretrained(...)         # on every rank, after torch.distributed.init_process_group
    enable(pipe, Parallel(guidance=2))
    pipe(prompt="...")                               # the same call on every rank; or follow(pipe) on all but rank 0
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import remove_context_parallel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from pusa.acceleration.blocks import blocks_of
from pusa.acceleration.decisions import Parallel
from pusa.acceleration.ranks import Ranks
from pusa.errors import first_line
from pusa.lora.sources import transformers_of
from pusa.models.frame_skipping import StepFrames
from pusa.models.passes import LocalPasses, StepInputs, predict
from pusa.models.vae import is_out_of_memory

MEMORY_ADVICE = "give --gpus 1, where smaller plans take over, or --memory smallest"


def choose(ranks: int, *, guided: bool, heads: int | None) -> Parallel:
    """Choose how a number of ranks share the work: the two passes of guidance first, then the tokens by Ulysses.

    Args:
        guided: a step has two passes.
        heads: attention heads of the transformer, which Ulysses divides; None: it divides none.

    Raises:
        ValueError: `ranks` is below 1.
    """
    if ranks < 1:
        raise ValueError(f"gpus={ranks} is below 1")
    divided = Parallel.divide(ranks, guided=guided)
    reasons = ["the two passes of guidance on two groups"] if divided.guidance == 2 else []
    if divided.ulysses > 1:
        uneven = "" if heads is None or heads % divided.ulysses == 0 else f", {heads} heads unevenly"
        reasons.append(f"the tokens among {divided.ulysses} (Ulysses{uneven})")
    return replace(divided, reason=", ".join(reasons))


def check_heads(heads: int, ulysses: int) -> None:
    """Raise ValueError if Ulysses cannot divide so many attention heads: diffusers pads fewer than a rank has."""
    share = -(-heads // ulysses)
    if share * ulysses - heads >= share:
        possible = [str(n) for n in range(1, ulysses) if n * -(-heads // n) - heads < -(-heads // n)]
        raise ValueError(
            f"ulysses={ulysses}: {heads} attention heads do not divide among so many ranks: {', '.join(possible)} do"
        )


def check_tokens(model: Any, parallel: Parallel) -> None:
    """Raise ValueError if ranks cannot share the tokens of a transformer's pass, or its attention heads, like that."""
    shares = parallel.ulysses * parallel.ring
    if shares == 1:
        return
    if not getattr(model, "_cp_plan", None):
        raise ValueError(
            f"gpus={parallel.ranks}: {shares} of them would share the tokens of a pass, which a "
            f"{type(model).__name__} cannot divide: give --gpus 2 with guidance above 1, or --gpus 1"
        )
    check_heads(model.config.num_attention_heads, parallel.ulysses)


def enable(pipe: Any, parallel: Parallel, ranks: Ranks | None = None) -> None:
    """Share the steps of a pipeline among ranks from now on; every rank must call it.

    Everything else comes first: LoRAs, merging, quantisation, the move to the device.

    Args:
        pipe: a `PusaPipeline` with its transformers on this rank's device.
        parallel: `parallel.ranks` must be the number of ranks.
        ranks: from `launch`; None: the processes of torch.distributed's default group.

    Raises:
        RuntimeError: there is no such group.
        ValueError: the number of ranks differs, the pipeline's weights are divided already, an attention backend
            does not do it, the heads do not divide, or a step cache would decide differently on every rank.
    """
    models, current = transformers_of(pipe), pipe.passes
    if isinstance(current, SharedPasses) and current.is_for(ranks, parallel, models):
        return
    disable(pipe)
    ranks = ranks or _default_ranks(models[0].device)
    if parallel.ranks != ranks.size:
        raise ValueError(
            f"guidance={parallel.guidance} x ulysses={parallel.ulysses} x ring={parallel.ring} needs {parallel.ranks} "
            f"ranks, and there are {ranks.size}: start as many, or choose(ranks, ...)"
        )
    if parallel.guidance not in (1, 2):
        raise ValueError(f"guidance={parallel.guidance} is neither 1 nor 2: a step has at most two passes")
    if parallel.ring > 1 and ranks.device.type == "cpu":
        raise ValueError(f"ring={parallel.ring} needs GPUs: attention on the CPU does not return its log-sum-exp")
    mesh = ranks.mesh(guidance=parallel.guidance, ring=parallel.ring, ulysses=parallel.ulysses)
    configs = [_split_tokens(model, parallel, mesh) for model in models] if parallel.ulysses * parallel.ring > 1 else []
    if parallel.shard:
        weights_mesh = ranks.mesh(weights=ranks.size)
        for model in models:
            _shard(model, weights_mesh, ranks.device)
    pipe.passes = SharedPasses(ranks, parallel, models, mesh["guidance"].get_group(), configs)


def disable(pipe: Any) -> None:
    """Let every process run the whole pipeline by itself again.

    Raises:
        ValueError: weights are divided, which cannot be undone.
    """
    passes = pipe.passes
    if not isinstance(passes, SharedPasses):
        return
    if passes.parallel.shard:
        raise ValueError("the weights of this pipeline are divided among ranks: load it again")
    if passes.parallel.ulysses * passes.parallel.ring > 1:
        for model in passes.models:
            _unite_tokens(model)
    pipe.passes = LocalPasses()


def describe_failure(error: BaseException) -> str:
    """Return why a rank cannot go on, in a line for the other ranks; if memory ran out, with the way out."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"out of memory: {MEMORY_ADVICE}"
    return f"{type(error).__name__}: {first_line(error)}"


def _unite_tokens(model: Any) -> None:
    """Undo `enable_parallelism`, for which diffusers has no way."""
    remove_context_parallel(model, model._cp_plan)
    model._parallel_config = None
    for module in model.modules():
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            module.processor._parallel_config = None


def _default_ranks(device: torch.device) -> Ranks:
    if not dist.is_initialized():
        raise RuntimeError("no ranks are connected: call torch.distributed.init_process_group on each of them first")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _split_tokens(model: Any, parallel: Parallel, mesh: DeviceMesh) -> ContextParallelConfig:
    """Divide the tokens of a transformer among the ranks that share a pass."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            "a step cache looks at a rank's own tokens and would decide differently on each: disable_cache() first, or "
            "share the passes of guidance only"
        )
    check_tokens(model, parallel)
    config = ContextParallelConfig(ulysses_degree=parallel.ulysses, ring_degree=parallel.ring, mesh=mesh)
    # diffusers divides the rank by the number of accelerators, even where the mesh is of CPUs and there are none.
    count = torch.accelerator.device_count() or mesh.size()
    with patch.object(torch.accelerator, "device_count", lambda: count):
        model.enable_parallelism(config=config)
    return config


def _shard(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the weights of a transformer's blocks among all ranks; a block is whole while it computes."""
    model.requires_grad_(False)
    blocks = blocks_of(model).values()
    for block in blocks:
        fully_shard(block, mesh=mesh)  # moves the share of this rank to its device
    shared = {id(parameter) for block in blocks for parameter in block.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in shared and tensor.device != device:
            tensor.data = tensor.data.to(device)


@dataclass
class _Call:
    """Hold the state of the call that is running."""

    latents: Tensor | None = None
    prompts: tuple[Tensor, ...] = ()  # as last sent or received
    message: tuple[dict[str, Any], list[Tensor]] | None = None  # received and not used yet
    has_ended: bool = False  # rank 0 has said so


class SharedPasses(LocalPasses):
    """Divide the passes of every step among ranks.

    Rank 0 sends a message before every step, or one that ends the call: the other ranks stop between the same two
    steps, whatever made rank 0 stop.
    """

    def __init__(
        self,
        ranks: Ranks,
        parallel: Parallel,
        models: list[Any],
        guidance_group: dist.ProcessGroup,
        configs: list[ContextParallelConfig],
    ) -> None:
        super().__init__()
        self.ranks, self.parallel, self.models = ranks, parallel, models
        self._guidance_group, self._configs = guidance_group, configs
        self._pass = dist.get_rank(guidance_group)
        self._call: _Call | None = None
        ranks.control()

    def is_for(self, ranks: Ranks | None, parallel: Parallel, models: list[Any]) -> bool:
        """Tell if these ranks share these very models in this way."""
        is_same = len(models) == len(self.models) and all(map(operator.is_, models, self.models))
        return is_same and self.parallel == parallel and ranks in (None, self.ranks)

    @contextmanager
    def call(self, latents: Tensor) -> Iterator[Tensor]:
        """Enclose the steps of a call; every rank starts from the latents of rank 0."""
        call = self._call = _Call()
        if not self.ranks.is_main:
            message, tensors = self.ranks.receive()
            _expect(message, "begin")
            try:
                yield tensors[0].to(latents)
                if not call.has_ended:
                    _expect(self.ranks.receive()[0], "end")
            finally:
                self._call = None
                self.stores.clear()
            return
        self.ranks.send({"kind": "begin"}, [latents])
        try:
            yield latents
        finally:
            self._call = None
            self.stores.clear()
            if not self.ranks.has_failed:
                self.ranks.send({"kind": "end"})

    def is_stopped(self, wanted: bool) -> bool:
        """Tell, before a step, if rank 0 ends the call there."""
        if self.ranks.is_main:
            return wanted
        assert self._call is not None
        self._call.message = message, _ = self.ranks.receive()
        self._call.has_ended = message["kind"] == "end"
        return self._call.has_ended

    def run(self, pipe: Any, inputs: StepInputs) -> list[Tensor]:
        """Predict the velocities of all passes of a step, each on the ranks that it is given to."""
        call = self._call
        assert call is not None
        self.ranks.check()
        if self.ranks.is_main:
            self._send_step(call, inputs)
        else:
            assert call.message is not None
            inputs, call.message = _received_step(call, *call.message), None
        return self._compute(pipe, inputs)

    def _send_step(self, call: _Call, inputs: StepInputs) -> None:
        is_known = len(call.prompts) == len(inputs.prompts) and all(
            known is prompt for known, prompt in zip(call.prompts, inputs.prompts, strict=True)
        )
        message = {
            "kind": "step",
            "expert": inputs.expert,
            "index": inputs.index,
            "steps": inputs.steps,
            "sigma": inputs.sigma,
            "attention_kwargs": inputs.attention_kwargs,
            "frames": inputs.frames and asdict(inputs.frames),
        }
        self.ranks.send(message, [inputs.latents, inputs.timesteps, *(() if is_known else inputs.prompts)])
        call.prompts = inputs.prompts

    def _compute(self, pipe: Any, inputs: StepInputs) -> list[Tensor]:
        model, passes = getattr(pipe, inputs.expert), len(inputs.prompts)
        self._allow_uneven(model, inputs.latents)
        is_shared = self.parallel.guidance == 2 and passes == 2
        try:
            with self.ranks.naming_failures():
                predicted = predict(model, inputs, [self._pass] if is_shared else range(passes), self.stores)
            if is_shared:
                return self.ranks.gather(predicted[0], self._guidance_group)
            if self.parallel.guidance == 2 and model.is_cache_enabled:  # the second group lacks the first pass's state
                return self.ranks.gather(predicted[0], self._guidance_group)[:1]
            return predicted
        except BaseException as error:  # the others wait for this rank: the group cannot go on
            self.ranks.report_failure(describe_failure(error))
            raise

    def _allow_uneven(self, model: Any, latents: Tensor) -> None:
        """Switch to attention for uneven shares where the tokens or the heads of this step need it: it is slower."""
        sizes = [size // patch for size, patch in zip(latents.shape[2:], model.config.patch_size, strict=True)]
        tokens, heads = sizes[0] * sizes[1] * sizes[2], model.config.num_attention_heads
        for config in self._configs:
            is_even = tokens % (config.ulysses_degree * config.ring_degree) == 0 and heads % config.ulysses_degree == 0
            if not is_even and config.ulysses_degree > 1 and config.ring_degree > 1:
                raise ValueError(
                    f"{tokens} tokens do not divide by ulysses={config.ulysses_degree} x ring={config.ring_degree}: "
                    "give another size, or share the tokens in one of the two ways"
                )
            config.ulysses_anything = not is_even and config.ulysses_degree > 1
            config.ring_anything = not is_even and config.ring_degree > 1

    def follow_call(self, pipe: Any) -> Iterator[StepInputs]:
        """Compute, on a rank other than 0, the steps of a call that has begun there; yield each one that is done."""
        call = _Call()
        try:
            while True:
                message, tensors = self.ranks.receive()
                if message["kind"] == "end":
                    return
                inputs = _received_step(call, message, tensors)
                self._compute(pipe, inputs)
                yield inputs
        finally:
            self.stores.clear()


def _received_step(call: _Call, message: dict[str, Any], tensors: list[Tensor]) -> StepInputs:
    _expect(message, "step")
    latents, timesteps, *prompts = tensors
    frames = message["frames"]
    call.prompts = tuple(prompts) or call.prompts
    return StepInputs(
        expert=message["expert"],
        index=message["index"],
        steps=message["steps"],
        sigma=message["sigma"],
        latents=latents,
        timesteps=timesteps,
        prompts=call.prompts,
        attention_kwargs=message["attention_kwargs"],
        frames=frames and StepFrames(*map(tuple, (frames["computed"], frames["kept"]))),
    )


def _expect(message: dict[str, Any], kind: str) -> None:
    if message["kind"] != kind:
        raise RuntimeError(
            f"rank 0 sends {message['kind']!r} where {kind!r} is due: every rank must make the same calls"
        )


def follow(pipe: Any) -> None:
    """Compute what the calls of rank 0 ask for, on every other rank, until rank 0 closes the group.

    Raises:
        RankError: a rank has failed.
    """
    passes: SharedPasses = pipe.passes
    while (message := passes.ranks.receive()[0])["kind"] != "close":
        _expect(message, "begin")
        with torch.no_grad():
            for _ in passes.follow_call(pipe):
                pass
