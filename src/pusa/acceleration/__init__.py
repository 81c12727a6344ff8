"""Choose how a model runs on a machine, and apply the choice to a pipeline from outside.

`plan` decides, from shapes alone; `apply` carries a plan out. Neither changes what the denoising loop does.
"""

from pusa.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "Card": "pusa.acceleration.decisions",
        "LoadOptions": "pusa.acceleration.decisions",
        "Machine": "pusa.acceleration.decisions",
        "Plan": "pusa.acceleration.decisions",
        "apply": "pusa.acceleration.placement",
        "plan": "pusa.acceleration.planning",
        "plans": "pusa.acceleration.planning",
    },
)
