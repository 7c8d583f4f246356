"""The entry point `vllm.general_plugins`: packed folders in vLLM.

vLLM calls `register` in every process it starts, its API server, engine and workers, and on every run, also those that
serve other models. What the plug-in does is in vllm_experts.py.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

# below vLLM's own logger, which is the one that is shown
logger = logging.getLogger("vllm.moesparse")


def register() -> None:
    """Make vLLM load folders whose quantization_config says "moesparse"; may be called again.

    A vLLM whose expert layers are not built as the plug-in needs them is left alone, with the reason in its log: then
    it refuses a packed folder as one of an unknown quantization, and serves all else.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from moesparse.packed.quantizer import METHOD
        from moesparse.packed.vllm_experts import MoESparseQuantization
    except ImportError as error:
        import vllm

        logger.error(
            "moesparse cannot serve packed folders through vLLM %s: %s. It is tested with vLLM 0.32.0 and 0.33.0",
            vllm.__version__,
            error,
        )
        return
    register_quantization_config(METHOD)(MoESparseQuantization)
