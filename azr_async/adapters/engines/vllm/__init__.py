"""vLLM as an engine: one `AsyncLLM` that serves jobs and takes new weights between two of its steps."""

from azr_async.adapters.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
