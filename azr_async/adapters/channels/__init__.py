"""Typed one-directional channels: in memory between stages, over ZeroMQ between processes. One contract for both."""

from azr_async.adapters.channels.endpoints import ZmqContext, shared_context
from azr_async.adapters.channels.memory import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.channels.zeromq_receiver import ZmqReceiver, zmq_receiver
from azr_async.adapters.channels.zeromq_sender import ZmqSender, zmq_sender

__all__ = [
    "MemoryReceiver",
    "MemorySender",
    "ZmqContext",
    "ZmqReceiver",
    "ZmqSender",
    "memory_channel",
    "shared_context",
    "zmq_receiver",
    "zmq_sender",
]
