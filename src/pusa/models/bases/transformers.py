"""Name the classes of all transformers, which diffusers reads from the signature of a pipeline."""

from diffusers import MochiTransformer3DModel, WanTransformer3DModel

from pusa.models.fvdm.transformer import FVDMTransformer3DModel
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel
from pusa.models.wan import PusaWanTransformer3DModel

Transformer = (
    WanTransformer3DModel
    | PusaWanTransformer3DModel
    | MochiTransformer3DModel
    | PusaMochiTransformer3DModel
    | FVDMTransformer3DModel
)
