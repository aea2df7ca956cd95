"""The embedded engine: continuous batching over any Hugging Face causal model with full attention."""

from azr_async.adapters.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
