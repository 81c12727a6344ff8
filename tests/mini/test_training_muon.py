"""Muon for all matrices of a shape at once: torch's own numbers, in a few launches."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pusa.mini.recipe.muon import BatchedMuon, orthogonalise

SHAPES = [(24, 24), (48, 24), (24, 48)] * 4


def make_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(0.1 * torch.randn(shape)) for shape in SHAPES]


def give_gradients(*sets: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*sets, strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.clone()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_takes_the_steps_of_torch_s_muon_up_to_the_rounding_of_bf16(weight_decay: float) -> None:
    one_by_one, together = make_parameters(), make_parameters()
    reference = torch.optim.Muon(one_by_one, lr=0.02, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="original")
    batched = BatchedMuon(together, lr=0.02, momentum=0.95, weight_decay=weight_decay)
    for step in range(3):
        give_gradients(one_by_one, together, seed=step)
        reference.step()
        batched.step()
    moved = (one_by_one[0] - make_parameters()[0]).abs().mean()
    for a, b in zip(one_by_one, together, strict=True):
        assert (a - b).abs().mean() < 0.02 * moved


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 32)).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


class Launches(TorchDispatchMode):
    """Counts the operations that a device would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def launches_of(parameters: list[nn.Parameter]) -> int:
    optimizer = BatchedMuon(parameters)
    give_gradients(parameters, seed=0)
    optimizer.step()  # makes its buffers
    with Launches() as launches:
        optimizer.step()
    return launches.count


def test_launches_depend_on_the_number_of_shapes_and_not_of_matrices() -> None:
    assert launches_of(make_parameters()) == launches_of(make_parameters()[:3])


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters = make_parameters()
    give_gradients(parameters, seed=0)
    parameters[0].grad = None
    optimizer = BatchedMuon(parameters, lr=0.1)
    optimizer.step()
    assert torch.equal(parameters[0], make_parameters()[0])
    assert not torch.equal(parameters[1], make_parameters()[1])


def test_its_state_can_be_saved_and_taken_up_again() -> None:
    through, stopped = make_parameters(), make_parameters()
    first, second = BatchedMuon(through), BatchedMuon(stopped)
    give_gradients(through, stopped, seed=0)
    first.step()
    second.step()
    resumed = BatchedMuon(stopped)
    resumed.load_state_dict(second.state_dict())
    give_gradients(through, stopped, seed=1)
    first.step()
    resumed.step()
    for a, b in zip(through, stopped, strict=True):
        assert torch.equal(a, b)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, not a parameter of shape \[3\]"):
        BatchedMuon([nn.Parameter(torch.zeros(3))])
