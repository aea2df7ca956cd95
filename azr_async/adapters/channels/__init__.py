"""Typed one-directional channels: in memory between stages, over ZeroMQ between processes. One contract for both."""

from azr_async.adapters.channels.memory import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.channels.zeromq_receiver import ZmqReceiver, zmq_receiver
from azr_async.adapters.channels.zeromq_sender import ZmqSender, zmq_sender

__all__ = [
    "MemoryReceiver",
    "MemorySender",
    "ZmqReceiver",
    "ZmqSender",
    "memory_channel",
    "zmq_receiver",
    "zmq_sender",
]
