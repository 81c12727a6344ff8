"""Keep lines out of every command's output that are for programmers: most are of libraries about each other."""

import logging

_ADVICE = {
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",  # diffusers 0.42
    "torchao": "Failed to load ",  # torchao 0.18, about kernels for cards that are not here
    "torch.utils._pytree": "is now natively supported by torch.compile",  # torch 2.13, about torchao's enumerations
    "diffusers.pipelines.pipeline_utils": "=None of type ",  # diffusers 0.42, about a model without text that is saved
}


def quiet_libraries() -> None:
    """Drop messages to programmers; call it before torch and diffusers are imported."""
    for name, text in _ADVICE.items():
        logging.getLogger(name).addFilter(_Without(text))


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()
