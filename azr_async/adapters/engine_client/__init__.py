"""Engines as self-play sees them: the inference workers behind channels, and a scripted one."""

from azr_async.adapters.engine_client.remote import RemoteEngines
from azr_async.adapters.engine_client.scripted import ScriptedEngine

__all__ = ["RemoteEngines", "ScriptedEngine"]
