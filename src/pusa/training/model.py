"""Load the transformer of a run, attach its adapter, shard it over processes and make its optimizers."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from diffusers import ContextParallelConfig
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pusa.acceleration.blocks import blocks_of
from pusa.lora.adapters import adapter_names
from pusa.models.bases import Base, base_of
from pusa.training.batches import Shape
from pusa.training.config import Expert, MethodConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from pusa.training.distributed import Processes
from pusa.training.start import begin_full, begin_lora, read_start

logger = logging.getLogger(__name__)

ADAPTER = "pusa"
P = TypeVar("P", bound=Tensor)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_transformer(config: TrainConfig, expert: str) -> Any:
    """Load one transformer of the source, on the CPU, in the dtype it is trained in, without the adapter of "mini".

    Raises:
        ValueError: the source has no such expert. Otherwise as `PusaPipeline.from_pretrained`.
    """
    from pusa import loading
    from pusa.pipeline import PusaPipeline

    dtype = torch.float32 if config.method.kind == "full" else _DTYPES[config.model.dtype]
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[expert]
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "vae", other))
    model = getattr(loading.load_pipeline(PusaPipeline, config.model.source, torch_dtype=dtype, **absent), expert)
    if model is None:
        raise ValueError(f"{config.model.source} has no {expert}: name the transformers it has in model.experts")
    return model


def prepare(
    transformer: Any,
    config: TrainConfig,
    processes: Processes,
    shapes: list[Shape],
    *,
    expert: Expert = "transformer",
    is_begun: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """Prepare a transformer for training, in place: trained weights in fp32 with gradients, all others frozen.

    LoRA's A is drawn from the seed, the same on every process and device, and B is zero, so that the adapted model
    begins as the base, or as the base with the adapter `config.start_from`.

    Args:
        transformer: of any base, without adapters.
        shapes: of the latents it will see.
        expert: which one it is, for adapters that come in pairs.
        is_begun: its weights will be those of a checkpoint, so that `start_from` is not read.

    Returns:
        The model and its trained parameters by name (`DTensor` where it is sharded).

    Raises:
        ValueError: it has adapters already, `start_from` does not fit, no layer has a name in the targets, or context
            parallelism cannot divide its heads or the clips' tokens.
    """
    base = base_of(transformer)
    model: Any = base.adopt(transformer)
    if adapter_names(model):
        raise ValueError(
            f"the transformer has adapters already ({', '.join(adapter_names(model))}): merge or unload them first"
        )
    pairs, deltas = ({}, {}) if is_begun else read_start(model, config, expert)
    if config.method.kind == "lora":
        _add_lora(model, config.method, config.seed)
        begin_lora(model, ADAPTER, pairs, config.method.alpha / config.method.rank)
    else:
        model.requires_grad_(True)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        begin_full(model, pairs, deltas)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    is_sharded = config.parallel.fsdp and processes.world > 1
    if config.parallel.fsdp and not is_sharded:
        logger.warning("fsdp shards over processes and there is only one: each weight stays whole")
    if not is_sharded:
        model.to(device=processes.device)
    if processes.context_parallel > 1:
        _enable_context_parallel(model, base, processes, shapes)
    if is_sharded:  # moves one block at a time to the device, where the whole model might not fit
        mesh = processes.mesh()
        for block in blocks_of(model).values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.train()
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def _add_lora(model: Any, method: MethodConfig, seed: int) -> None:
    model.requires_grad_(False)
    lora = LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=list(method.targets), lora_bias=False)
    try:
        model.add_adapter(lora, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"method.targets={', '.join(method.targets)} do not fit this model: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # PEFT gives its matrices the dtype of the layer they adapt
            parameter.data = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5), generator=generator)


def _enable_context_parallel(model: Any, base: Base, processes: Processes, shapes: list[Shape]) -> None:
    degree = processes.context_parallel
    if getattr(model, "_cp_plan", None) is None:
        raise ValueError(
            f"context_parallel={degree}: a clip of {base.name} cannot be shared among cards; set parallel.fsdp=true, "
            "or give each card clips of its own"
        )
    heads = model.config.num_attention_heads
    if heads % degree:
        raise ValueError(f"context_parallel={degree} does not divide the {heads} attention heads")
    p_t, p_h, p_w = base.patch(model.config)
    for shape in shapes:
        tokens = (shape[1] // p_t) * (shape[2] // p_h) * (shape[3] // p_w)
        if tokens % degree:
            raise ValueError(f"context_parallel={degree} does not divide the {tokens} tokens of clips of shape {shape}")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=processes.context_mesh()))


def precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass: bf16 or fp32.

    The backward pass follows the forward, and gradient checkpointing restores it.
    """
    # Every weight is used once: autocast's cache would only keep copies of them all until the end of the pass.
    return torch.autocast(device.type, torch.bfloat16, enabled=config.model.dtype == "bf16", cache_enabled=False)


@contextmanager
def kernels(config: TrainConfig, model: nn.Module) -> Iterator[None]:
    """Choose the attention kernel and the adapters' input dtype for forward and backward passes.

    The backward needs it too, as gradient checkpointing computes the forward there again. Inputs of an adapter stay in
    bf16 under autocast: PEFT would copy them to fp32, the adapter's dtype, only for autocast to copy them back.
    """
    attention = sdpa_kernel(SDPBackend.MATH) if config.model.attention == "math" else nullcontext()
    with attention, disable_input_dtype_casting(model, active=config.model.dtype == "bf16"):
        yield


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- optimizer and schedule ----------------------------------------------------------------------------------------


def make_optimizers(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Make AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Raises:
        ValueError: this torch has no Muon.
    """
    matrices: list[Tensor] = []
    if config.name == "muon":
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and "blocks" in name.partition(".")[0]]
    rest = without(parameters.values(), matrices)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon: take optimizer.name=adamw, or torch 2.9")
        decay = config.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=decay))
    if rest:
        optimizers.append(
            torch.optim.AdamW(
                rest,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=rest[0].device.type in ("cpu", "cuda"),
            )
        )
    return optimizers


def without(parameters: Iterable[P], chosen: Iterable[Tensor]) -> list[P]:
    """List the parameters that are not among the chosen ones."""
    chosen_ids = {id(parameter) for parameter in chosen}
    return [parameter for parameter in parameters if id(parameter) not in chosen_ids]


def lr_factor(schedule: ScheduleConfig, step: int, progress: float) -> float:
    """Compute the factor of the learning rates at a step.

    It is ``min((step + 1) / warmup_steps, 1)`` times a curve of the progress (0 at the start, 1 at the end): constant
    until the cool-down and straight down to the floor over it; "linear" and "cosine" fall to it over the whole run.
    """
    warm = min((step + 1) / schedule.warmup_steps, 1.0) if schedule.warmup_steps else 1.0
    if schedule.shape == "constant":
        share = schedule.cooldown_share
        done = max(0.0, (progress - (1 - share)) / share) if share else 0.0
    elif schedule.shape == "linear":
        done = progress
    else:
        done = 0.5 * (1 - math.cos(math.pi * progress))
    return warm * (1 - (1 - schedule.floor) * min(done, 1.0))


class MovingAverage:
    """Average the trained weights over steps: ``average += (1 - decay) * (weight - average)``.

    The decay is at most ``(1 + n) / (10 + n)`` after n steps: an average over thousands would still be the start.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.model = model
        self.decay = decay
        self.parameters = parameters
        self.averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after step number `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = [local(average) for average in self.averages.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as the model's weights within the context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for name, average in self.averages.items():
            parameter = local(self.parameters[name].detach())
            kept = parameter.clone()
            parameter.copy_(local(average))
            local(average).copy_(kept)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # a pass without gradients leaves the root's weights gathered
                module.reshard()


class Updater:
    """Update weights from their gradients: the optimizers at scaled rates, and a moving average of the weights.

    Args:
        parameters: the trained parameters of `model` by name.
        ema_decay: of the moving average; None: no average.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        ema_decay: float | None,
    ) -> None:
        self.model, self.parameters, self.optimizers = model, parameters, optimizers
        self.average = MovingAverage(model, parameters, ema_decay) if ema_decay else None
        self._rates = [group["lr"] for group in self._groups()]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of this step; parameters that took no part have none."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def scale_rates(self, factor: float) -> None:
        """Set every learning rate to `factor` times its first value."""
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate * factor

    def _groups(self) -> list[dict[str, Any]]:
        """List the optimizers' groups as they are now: loading a state replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale longer gradients down to `max_norm`; return the norm before, without waiting for the device."""
        return nn.utils.clip_grad_norm_(self.parameters.values(), float("inf") if max_norm is None else max_norm)

    def update(self, step: int) -> None:
        """Take step number `step` of every optimizer and of the average."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update(step)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
