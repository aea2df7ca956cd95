"""Starts vLLM with what asynchronous reinforcement learning needs of it."""

from typing import Any, Final

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import AsyncEngineArgs
from vllm.config import WeightTransferConfig
from vllm.v1.engine.async_llm import AsyncLLM

from azr_async.adapters.engines.texts import end_ids
from azr_async.adapters.engines.vllm.engine import CANARY_SLOTS, VllmEngine
from azr_async.config import Config
from azr_async.errors import EngineError

_CPU_BLOCK_TOKENS: Final = 128
"""vLLM's block of the key-value cache on a CPU; a sequence fills whole ones."""


def open_engine(source: str, config: Config, *, transfer_backend: str, worker_extension: str, seed: int) -> VllmEngine:
    """Start vLLM's processes and load the model; takes the better part of a minute.

    The thread that calls this has to outlive the engine: vLLM's processes end with it.

    Args:
        source: folder or hub id of the model.
        config: its sections model, engine, placement and weights.
        transfer_backend: name under which a plugin has registered the receiving end of weights.
        worker_extension: class by whose `weights_have_arrived` its processes tell that they have received them.
        seed: of all draws; engines with the same one would draw alike.

    Raises EngineError when vLLM cannot serve the model.
    """
    try:
        arguments = _arguments(source, config, transfer_backend, worker_extension, seed)
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise EngineError(
            f"vLLM cannot serve {source}: {error} Look into this worker's log; --engine transformers serves any causal "
            "model with full attention."
        ) from error
    return VllmEngine(
        llm,
        tokenizer,
        end_ids(_end_ids_of_model(source), tokenizer),
        slots=config.engine.slots,
        context_tokens=config.engine.context_tokens,
        on_new_weights=config.engine.on_new_weights,
        weights_device=config.weights_device,
        deadline_seconds=config.weights.deadline_seconds,
    )


def _arguments(source: str, config: Config, transfer_backend: str, worker_extension: str, seed: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": source,
        "dtype": config.model.precision,
        "max_model_len": config.engine.context_tokens,
        "max_num_seqs": config.engine.slots + CANARY_SLOTS,
        "tensor_parallel_size": config.placement.tensor_parallel,
        "seed": seed,
        "generation_config": "vllm",  # every sampling parameter comes with the job
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "weight_transfer_config": WeightTransferConfig(backend=transfer_backend),
        "worker_extension_cls": worker_extension,
        "disable_log_stats": True,
    }
    if config.placement.inference_gpus:
        return arguments | {"gpu_memory_utilization": config.engine.memory_share}
    # Compiling costs a CPU more than it brings to the models that it can serve.
    return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": _cache_bytes(source, config)}


def _end_ids_of_model(source: str) -> object:
    """What the generation configuration names; a model need not have one."""
    try:
        return GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        return AutoConfig.from_pretrained(source).eos_token_id


def _cache_bytes(source: str, config: Config) -> int:
    """Keys and values of as many full sequences as there are slots, and some blocks for prompts that are shared."""
    shape: Any = AutoConfig.from_pretrained(source).get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    item_bytes = {"float32": 4, "bfloat16": 2}[config.model.precision]
    blocks_of_one = -(-config.engine.context_tokens // _CPU_BLOCK_TOKENS) + 1
    tokens = (config.engine.slots + CANARY_SLOTS + 1) * blocks_of_one * _CPU_BLOCK_TOKENS
    return int(2 * shape.num_hidden_layers * heads * head_size * item_bytes * tokens)
