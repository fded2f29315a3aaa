"""The configuration classes of tensorrt_llm.llmapi."""

from types import SimpleNamespace
from typing import Any

from strict import Strict

from tensorrt_llm import _LINE


class KvCacheConfig(Strict):
    """KV cache settings."""

    FIELDS = _LINE.fields("KvCacheConfig")


class TorchLlmArgs:
    """Its model_fields are what the worker asks for."""

    model_fields: dict[str, Any] = dict.fromkeys(_LINE.fields("TorchLlmArgs"))


if _LINE.has_engines:

    class QuantConfig(Strict):
        """Quantization settings."""

        FIELDS = _LINE.fields("QuantConfig")

    class CalibConfig(Strict):
        """Calibration settings."""

        FIELDS = _LINE.fields("CalibConfig")

    QuantAlgo = SimpleNamespace(FP8="FP8", NO_QUANT="NO_QUANT")
