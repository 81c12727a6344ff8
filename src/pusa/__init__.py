"""Generate video with vectorised timesteps: one diffusion time per latent frame.

The package imports its public names on first use, so that `import pusa` and `pusa --help` load no torch.
"""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names

if TYPE_CHECKING:
    from pusa.conditions import PusaCondition
    from pusa.ddim import PusaDDIMScheduler
    from pusa.models.fvdm.transformer import FVDMTransformer3DModel
    from pusa.models.mochi.transformer import PusaMochiTransformer3DModel
    from pusa.models.single_file.loading import load_single_file
    from pusa.models.wan import PusaWanTransformer3DModel
    from pusa.pipeline import PusaPipeline
    from pusa.request import GenerationRequest
    from pusa.scheduler import PusaFlowMatchEulerScheduler

__version__ = "0.1.0"  # here, as the package also runs uninstalled, from a folder on the path

_MODULES = {
    "FVDMTransformer3DModel": "pusa.models.fvdm.transformer",
    "GenerationRequest": "pusa.request",
    "PusaCondition": "pusa.conditions",
    "PusaDDIMScheduler": "pusa.ddim",
    "PusaFlowMatchEulerScheduler": "pusa.scheduler",
    "PusaMochiTransformer3DModel": "pusa.models.mochi.transformer",
    "PusaPipeline": "pusa.pipeline",
    "PusaWanTransformer3DModel": "pusa.models.wan",
    "load_single_file": "pusa.models.single_file.loading",
}

__all__ = [
    "FVDMTransformer3DModel",
    "GenerationRequest",
    "PusaCondition",
    "PusaDDIMScheduler",
    "PusaFlowMatchEulerScheduler",
    "PusaMochiTransformer3DModel",
    "PusaPipeline",
    "PusaWanTransformer3DModel",
    "__version__",
    "load_single_file",
]


__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
