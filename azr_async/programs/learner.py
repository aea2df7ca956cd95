"""The learner: batches -> optimizer step -> weights; evaluations, metrics, checkpoints.

Rank 0 has the wires and the files. The other ranks do what it orders: train their share of a batch, and, when the
weights are sharded, put them together to be pushed, scored or saved.
"""

import asyncio
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Final

import torch as pytorch

from azr_async.adapters import checkpoints
from azr_async.adapters.channels import wire
from azr_async.adapters.models import load_model
from azr_async.adapters.trainer import Crew, Trainer, connect_ranks, follow, loading_device
from azr_async.config import Config
from azr_async.messages import RolloutBatch
from azr_async.programs.learner_loop import Leader, Loaded
from azr_async.programs.learner_metrics import Books
from azr_async.programs.learner_saving import saving
from azr_async.programs.learner_weights import publishing
from azr_async.programs.learner_wires import StopRequested, Wires, open_wires
from azr_async.programs.torch_thread import TorchThread, end_of_process, torch_thread
from azr_async.programs.wiring import Reporter, load_run_config, program_main, program_parser

CHECKPOINTS_FOLDER: Final = "checkpoints"

log = logging.getLogger(__name__)


def main() -> int:
    """Run one rank of the learner; returns its exit status."""
    parser = program_parser("Trains on the batches of self-play and pushes the weights to the engines.")
    parser.add_argument("--rank", type=int, required=True, help="rank of this process among the learner's")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint folder to go on from")
    arguments = parser.parse_args()
    config = load_run_config(arguments.run_dir)
    program = partial(
        learn,
        run_dir=arguments.run_dir,
        wires_dir=arguments.wires,
        config=config,
        rank=arguments.rank,
        resume=arguments.resume,
    )
    return end_of_process(
        program_main(f"learner-{arguments.rank}", arguments.run_dir, arguments.wires, config, program)
    )


async def learn(
    reporter: Reporter, *, run_dir: Path, wires_dir: Path, config: Config, rank: int, resume: Path | None
) -> None:
    """Be one rank of the learner until the run is over.

    Raises:
        AzrError: what went wrong, who did not answer, and what to do.
    """
    async with torch_thread(config.wires.stop_seconds) as torch:
        reporter.report("loading the model", 0, config.run.steps)
        if rank > 0:
            await torch.run(partial(_follow, config, resume))
            return
        try:
            async with asyncio.TaskGroup() as group:
                loading = group.create_task(torch.run(partial(_load, config, resume)), name="load")
                async with open_wires(config, wires_dir, reporter.process, reporter.stop_requested) as wires:
                    await _lead(await loading, torch, wires, reporter, run_dir=run_dir, config=config)
        except* StopRequested:
            log.info("asked to stop before the first step")


async def _lead(
    loaded: Loaded, torch: TorchThread, wires: Wires, reporter: Reporter, *, run_dir: Path, config: Config
) -> None:
    """Rank 0: the whole run, from the first weights to the last checkpoint."""
    resumed_step = loaded.crew.version if loaded.is_resumed else None
    vocabulary = loaded.model.config.vocab_size
    checkpoint_root = run_dir / CHECKPOINTS_FOLDER
    if resumed_step is not None:
        # With the lines that Books cuts off, and before them: the newest checkpoint never lacks its lines.
        await torch.run(partial(checkpoints.remove_after, checkpoint_root, resumed_step))
    with Books(run_dir, config, resumed_step=resumed_step) as books:
        async with (
            saving(config, checkpoint_root, loaded.model, loaded.tokenizer) as saver,
            publishing(config, loaded.crew, torch, wires, vocabulary=vocabulary) as publisher,
        ):
            leader = Leader(
                loaded,
                config,
                torch=torch,
                wires=wires,
                publisher=publisher,
                books=books,
                reporter=reporter,
                saver=saver,
            )
            await leader.run()
    await torch.run(loaded.crew.dismiss)


def _follow(config: Config, resume: Path | None) -> None:
    """Rank 1 and up: do what rank 0 orders until the run is over."""
    loaded = _load(config, resume)

    def decode(payload: bytes) -> RolloutBatch:
        batch = wire.decode(payload, limit_bytes=config.wires.message_mb * 2**20)
        assert isinstance(batch, RolloutBatch)
        return batch

    follow(loaded.trainer, loaded.accelerator, decode=decode)


def _load(config: Config, resume: Path | None) -> Loaded:
    accelerator = connect_ranks(config)
    state = checkpoints.load(resume) if resume else None
    model, tokenizer = load_model(str(resume or config.model.path), "float32", loading_device(config, accelerator))
    trainer = Trainer(model, config, accelerator, version=state.version if state else 0)
    if state:
        trainer.load_optimizer_state(state.optimizer)
        pytorch.set_rng_state(state.random_state)
    else:
        pytorch.manual_seed(config.run.seed)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        trainer=trainer,
        crew=Crew(trainer, accelerator, encode=wire.encode),
        accelerator=accelerator,
        is_resumed=state is not None,
        wall_seconds=state.extra["wall_seconds"] if state else 0.0,
        self_play=state.self_play if state else "",
        numbers=state.extra if state else {},
    )


if __name__ == "__main__":
    sys.exit(main())
