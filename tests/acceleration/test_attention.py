"""Choose what computes attention by the card and what is installed; it can be asked for, and is never required."""

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from pusa.acceleration import attention
from pusa.acceleration.attention import BACKENDS, available, choose
from pusa.acceleration.decisions import LoadOptions

HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (12, 0)


def installed(*modules: str) -> dict[str, Any]:
    return {"is_importable": lambda module: module in modules}


@pytest.mark.parametrize(
    ("capability", "modules", "word"),
    [
        (HOPPER, ["flash_attn_interface"], "flash3"),
        (HOPPER, ["fa3_fwd_interface"], "flash3"),
        (HOPPER, ["flash_attn", "kernels", "sageattention"], "cudnn"),
        (BLACKWELL, ["fa3_fwd_interface"], "cudnn"),  # FlashAttention 3 has no kernels for it
        (ADA, ["fa3_fwd_interface"], "native"),
        ((7, 5), [], "native"),
        (None, ["fa3_fwd_interface"], "native"),
    ],
)
def test_each_card_has_the_fastest_that_runs_there(capability: Any, modules: list[str], word: str) -> None:
    assert choose(capability, **installed(*modules)) == word


def test_cards_that_share_tokens_have_one_that_can_and_float32_has_torchs() -> None:
    fa3 = installed("fa3_fwd_interface")
    assert choose(HOPPER, shares_tokens=True, **fa3) == "cudnn"
    assert choose(HOPPER, dtype="float32", **fa3) == "native"


def test_what_is_asked_for_is_taken_or_refused_with_a_way_out() -> None:
    assert choose(HOPPER, asked="native", **installed("fa3_fwd_interface")) == "native"
    assert choose(ADA, asked="_native_cudnn", **installed()) == "cudnn"
    for capability, asked, shares, message in (
        (HOPPER, "flash3", False, r"is not installed \(pip install fa3-fwd.*available here: auto, native, cudnn"),
        (ADA, "flash3", False, r"needs a card of compute capability 9\.0 up to, not including, 10\.0.* has 8\.9"),
        (None, "cudnn", False, "needs a CUDA card, and there is none; available here: auto, native"),
        (HOPPER, "xformers", True, "cannot share the tokens"),
    ):
        with pytest.raises(ValueError, match=f"attention={asked} {message}"):
            choose(capability, asked=asked, shares_tokens=shares, **installed("xformers"))
    with pytest.raises(ValueError, match="attention='flesh3' is none of auto, native"):
        LoadOptions(attention="flesh3")


def test_every_backend_is_one_of_diffusers_and_shares_tokens_as_there() -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    for backend in BACKENDS.values():
        assert AttentionBackendName(backend.name) in registry.list_backends()
        assert backend.shares_tokens == (backend.name in registry._supports_context_parallel), backend.name
    assert set(available(None)) == {"native", "native_math"}


def test_one_model_changes_and_other_models_of_the_process_do_not(tiny_pipeline: Any) -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    x, t, c = torch.randn(1, 16, 3, 4, 6), torch.full((1, 3), 500.0), torch.randn(1, 16, 48)
    with torch.no_grad():
        before = pipe.transformer(x, t, c).sample
        default = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
        attention.apply(pipe, "native_math")
        assert attention.current(pipe.transformer) == "_native_math"
        torch.testing.assert_close(pipe.transformer(x, t, c).sample, before)
        assert attention.current(other.transformer) is None
        assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == default
        attention.remove(pipe)
        assert torch.equal(pipe.transformer(x, t, c).sample, before)
    with pytest.raises(ValueError, match="is none of auto, native"):
        attention.apply(pipe, "fast")
