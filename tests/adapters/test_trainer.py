"""The optimizer step: equal to a plain loop, alike on any number of ranks, and picky about what it trains on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

from azr_async.adapters.trainer import StepReport, Trainer, connect_ranks
from azr_async.algorithm.credit import task_relative_advantages
from azr_async.config import Config
from azr_async.errors import TrainingError
from azr_async.messages import Rollout, RolloutBatch
from tests.adapters import trainer_rank
from tests.adapters.rank_processes import run_ranks
from tests.random_models import VOCABULARY, random_model
from tests.rollout_batches import random_batch


def settings(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def trainer_of(config: Config, seed: int = 0, version: int = 0) -> Trainer:
    return Trainer(random_model("qwen2-tied", seed), config, connect_ranks(config), version=version)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.named_weights()}


def trained(config: Config, batches: list[RolloutBatch], seed: int = 0) -> tuple[dict[str, Tensor], list[StepReport]]:
    trainer = trainer_of(config, seed, batches[0].version)
    reports = [trainer.train(batch) for batch in batches]
    return weights_of(trainer), reports


def with_tokens(rollout: Rollout, **versions: int) -> Rollout:
    changed = rollout.token_version.copy()
    changed[rollout.prompt_length] = versions["first"]
    return replace(rollout, token_version=changed)


# ---------------------------------------------------------------- the same as a plain loop


def plain_loop(config: Config, batches: list[RolloutBatch]) -> dict[str, Tensor]:
    """Synchronous training in torch alone: one padded batch, one loss, one update after the other."""
    model = random_model("qwen2-tied")
    learner = config.learner
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learner.learning_rate, betas=learner.betas, weight_decay=0.0, fused=True
    )
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learner.learning_rate * min(1.0, step / learner.warmup_steps)
        cells = [(rollout.role, rollout.task) for rollout in batch.rollouts]
        lengths = [len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts]
        advantages, _ = task_relative_advantages([r.reward for r in batch.rollouts], lengths, cells)
        order = sorted(range(len(cells)), key=lambda n: (-len(batch.rollouts[n].token_ids), n))
        ids = torch.zeros(len(order), len(batch.rollouts[order[0]].token_ids), dtype=torch.long)
        is_target = torch.zeros_like(ids, dtype=torch.bool)
        behavior, advantage, weight = (torch.zeros(ids.shape) for _ in range(3))
        for row, n in enumerate(order):
            rollout, end = batch.rollouts[n], len(batch.rollouts[n].token_ids)
            ids[row, :end] = torch.from_numpy(rollout.token_ids)
            is_target[row, rollout.prompt_length : end] = True
            behavior[row, :end] = torch.from_numpy(rollout.behavior_logp)
            advantage[row] = advantages[n]
            weight[row] = (learner.propose_weight if rollout.role == "propose" else 1.0) / sum(lengths)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][is_target[:, 1:]])
        logp = -functional.cross_entropy(logits, ids[is_target], reduction="none")
        truncated = (logp.detach() - behavior[is_target]).exp().clamp(max=learner.ratio_cap)
        ratio = (logp - logp.detach()).exp()
        (weight[is_target] * (truncated * (-advantage[is_target] * ratio))).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), learner.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def test_without_lag_the_weights_equal_a_plain_synchronous_loop_bit_for_bit() -> None:
    config = settings(flow={"max_lag": 0})
    batches = [random_batch(version, per_cell=2) for version in range(8)]  # small: each is one micro-batch
    weights, _ = trained(config, batches)
    expected = plain_loop(config, batches)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_same_batches_give_the_same_weights_bit_for_bit() -> None:
    config = settings(learner={"minibatches": 2, "proximal": "recomputed"})
    batches = [random_batch(version, lag=2) for version in range(3)]
    first, second = trained(config, batches)[0], trained(config, batches)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- however it is cut


@pytest.mark.parametrize(
    "learner",
    [
        {},
        {"aggregation": "sequence"},
        {"cell_weights": "equal", "objective": "cispo"},
        {"objective": "masked-is", "entropy_weight": 0.01},
        {"proximal": "interpolated", "normalise": "token"},
        {"proximal": "recomputed", "minibatches": 3},
    ],
)
def test_the_size_of_the_micro_batches_does_not_matter(learner: dict[str, Any]) -> None:
    batches = [random_batch(version, lag=2) for version in range(2, 4)]
    whole, reports = trained(settings(learner=learner), batches)
    in_pieces, reports_in_pieces = trained(settings(learner=learner | {"microbatch_tokens": 30}), batches)
    for name in whole:
        torch.testing.assert_close(in_pieces[name], whole[name], rtol=1e-3, atol=2e-5)
    for one, other in zip(reports, reports_in_pieces, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert other.ess == pytest.approx(one.ess, rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama-untied"])
def test_sharing_prompts_changes_nothing_but_the_work(kind: str) -> None:
    batches = [random_batch(version, lag=2, attempts=4) for version in range(2, 5)]
    reports = []
    weights = []
    for share_prompts in (True, False):
        config = settings(learner={"share_prompts": share_prompts, "entropy_weight": 0.01})
        trainer = Trainer(random_model(kind), config, connect_ranks(config), version=2)
        reports.append([trainer.train(batch) for batch in batches])
        weights.append(weights_of(trainer))
    for shared, alone in zip(*reports, strict=True):
        assert shared.computed_tokens < 0.7 * alone.computed_tokens
        for name in ("loss", "grad_norm", "ess", "kl_k3", "entropy", "max_ratio"):
            assert getattr(shared, name) == pytest.approx(getattr(alone, name), rel=1e-4, abs=1e-5)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=5e-5)


def test_two_ranks_do_what_one_does_and_name_the_loss_of_one(tmp_path: Path) -> None:
    run_ranks("tests.adapters.trainer_rank", tmp_path, 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for index, measured in enumerate(first):
        expected, expected_weights = trainer_rank.trained(index, connect_ranks(Config()))
        for two, one in zip(measured, expected, strict=True):
            assert two == pytest.approx(one, rel=2e-4, abs=1e-5)
        for rank in range(2):
            weights = load_file(tmp_path / f"{rank}-{index}.safetensors")
            for name in expected_weights:
                torch.testing.assert_close(weights[name], expected_weights[name], rtol=1e-3, atol=5e-5)
    complaint = (tmp_path / "complaint.txt").read_text()
    assert "rank 0 of the learner lost the other ranks" in complaint
    assert "learner-<rank> logs" in complaint


# ---------------------------------------------------------------- what is refused


def test_a_token_beyond_the_lag_bound_is_refused_by_name() -> None:
    batch = random_batch(5)
    old = with_tokens(batch.rollouts[7], first=2)
    stale = RolloutBatch(version=5, rollouts=(*batch.rollouts[:7], old))
    trainer = trainer_of(settings(flow={"max_lag": 2}), version=5)
    before = weights_of(trainer)
    with pytest.raises(
        TrainingError, match=r"rollout 7 of group 7 .*versions 2\.\.5.*trains version 5 with max_lag = 2"
    ):
        trainer.train(stale)
    assert trainer.version == 5
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.named_weights())


def test_a_token_from_the_future_is_refused() -> None:
    batch = random_batch(5)
    early = RolloutBatch(version=5, rollouts=(with_tokens(batch.rollouts[0], first=6),))
    with pytest.raises(TrainingError, match=r"versions 5\.\.6|versions 6\.\.6"):
        trainer_of(settings(), version=5).train(early)


@pytest.mark.parametrize("rollouts", [(), None])
def test_a_batch_out_of_step_or_empty_is_refused(rollouts: tuple[Rollout, ...] | None) -> None:
    batch = random_batch(3) if rollouts is None else RolloutBatch(version=2, rollouts=rollouts)
    with pytest.raises(TrainingError, match=r"lost step|empty"):
        trainer_of(settings(), version=2).train(batch)


def test_a_rollout_without_completion_is_refused() -> None:
    rollout = random_batch(0).rollouts[0]
    bare = replace(rollout, token_version=np.full(len(rollout.token_ids), -1, np.int32))
    with pytest.raises(TrainingError, match="nothing to train on"):
        trainer_of(settings()).train(RolloutBatch(version=0, rollouts=(bare,)))


def test_stale_data_without_correction_is_refused_unless_asked_for() -> None:
    plain = settings(flow={"max_lag": 0}, learner={"objective": "none"})
    stale = plain.model_copy(update={"flow": plain.flow.model_copy(update={"max_lag": 2})})
    allowed = stale.model_copy(update={"learner": stale.learner.model_copy(update={"allow_uncorrected": True})})
    with pytest.raises(TrainingError, match="without correction"):
        trainer_of(stale).train(random_batch(0))
    assert trainer_of(allowed).train(random_batch(0)).version == 1
    assert trainer_of(plain).train(random_batch(0)).version == 1


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    trainer = trainer_of(settings())
    batch = random_batch(0)
    before = weights_of(trainer)
    broken = replace(batch.rollouts[0], behavior_logp=np.full_like(batch.rollouts[0].behavior_logp, np.nan))
    with pytest.raises(TrainingError, match=r"step 1: .*nan.*learning_rate"):
        trainer.train(RolloutBatch(version=0, rollouts=(broken, *batch.rollouts[1:])))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.named_weights())
    assert trainer.train(batch).version == 1


# ---------------------------------------------------------------- what a step reports and does


def test_the_report_tells_the_whole_batch() -> None:
    batch = random_batch(4, lag=2)
    report = trainer_of(settings(), version=4).train(batch)
    assert report.version == 5
    assert (report.lag_mean, report.lag_max) == (2.0, 2)
    assert report.trained_samples == 24
    assert report.trained_tokens == sum(len(r.token_ids) - r.prompt_length for r in batch.rollouts)
    assert report.cells["solve", "induction"].count == 4
    assert report.cells["solve", "induction"].mean == pytest.approx(np.mean([r.reward for r in batch.rollouts[-4:]]))
    assert 0 < report.ess < 1
    assert report.learning_rate == pytest.approx(5e-4)


def test_the_learning_rate_rises_linearly_and_then_stays() -> None:
    _, reports = trained(settings(), [random_batch(version) for version in range(7)])
    assert [report.learning_rate for report in reports] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 5e-4, 5e-4])


def test_rollouts_without_advantage_are_not_computed_but_counted() -> None:
    batch = random_batch(0)
    flat = tuple(replace(r, reward=1.0) if r.role == "propose" else r for r in batch.rollouts)
    report = trainer_of(settings()).train(RolloutBatch(version=0, rollouts=flat))
    assert (report.trained_samples, report.computed_samples) == (24, 12)
    assert report.trained_tokens == sum(len(r.token_ids) - r.prompt_length for r in flat)


def test_a_batch_without_any_advantage_is_a_step_without_gradient() -> None:
    batch = random_batch(0)
    flat = tuple(replace(rollout, reward=1.0) for rollout in batch.rollouts)
    trainer = trainer_of(settings())
    before = weights_of(trainer)
    report = trainer.train(RolloutBatch(version=0, rollouts=flat))
    assert (report.loss, report.grad_norm, report.version) == (0.0, 0.0, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.named_weights())


def test_shuffled_rewards_train_something_else_reproducibly() -> None:
    batches = [random_batch(0)]
    plain, _ = trained(settings(), batches)
    shuffled, reports = trained(settings(control={"shuffle_rewards": True}), batches)
    again, _ = trained(settings(control={"shuffle_rewards": True}), batches)
    assert all(torch.equal(shuffled[name], again[name]) for name in again)
    assert any(not torch.equal(shuffled[name], plain[name]) for name in plain)
    assert reports[0].cells["solve", "deduction"].mean == pytest.approx(
        np.mean([r.reward for r in batches[0].rollouts if (r.role, r.task) == ("solve", "deduction")])
    )


def test_an_untrained_proposer_costs_nothing() -> None:
    report = trainer_of(settings(learner={"propose_weight": 0.0})).train(random_batch(0))
    assert report.computed_samples == 12


def test_training_makes_good_tokens_likelier_and_bad_ones_rarer() -> None:
    batch = random_batch(0, per_cell=2)
    trainer = trainer_of(settings(learner={"warmup_steps": 0, "propose_weight": 1.0}))
    solves = [r for r in batch.rollouts if r.role == "solve"]

    def gains() -> list[float]:
        return [float(trainer.score([r.token_ids])[r.prompt_length - 1 :].mean()) for r in solves]

    before = gains()
    for version in range(3):
        trainer.train(RolloutBatch(version=version, rollouts=random_batch_at(batch, version)))
    pairs = zip(solves, before, gains(), strict=True)
    signs = [(np.sign(after - earlier), rollout.reward) for rollout, earlier, after in pairs]
    best = [sign for sign, reward in signs if reward == max(r for _, r in signs)]
    assert best == [1.0]


def random_batch_at(batch: RolloutBatch, version: int) -> tuple[Rollout, ...]:
    return tuple(
        replace(r, token_version=np.where(r.token_version < 0, -1, version).astype(np.int32)) for r in batch.rollouts
    )


# ---------------------------------------------------------------- scores and state


def test_scores_equal_a_plain_forward_pass() -> None:
    trainer, model = trainer_of(settings()), random_model("qwen2-tied")
    sequences = [np.arange(3, 12, dtype=np.int32), np.array([5, 200, 7], np.int32)]
    expected = []
    with torch.no_grad():
        for ids in sequences:
            tokens = torch.from_numpy(ids.astype(np.int64))
            logp = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
            expected.append(logp.gather(1, tokens[1:, None])[:, 0].numpy())
    scores = trainer.score(sequences)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.concatenate(expected), atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied"])
def test_weights_carry_the_names_of_a_checkpoint(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path)
    config = settings()
    trainer = Trainer(model, config, connect_ranks(config))
    stored = load_file(tmp_path / "model.safetensors")
    weights = weights_of(trainer)
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    config = settings()
    batches = [random_batch(version) for version in range(4)]
    expected, _ = trained(config, batches)
    first = trainer_of(config)
    for batch in batches[:2]:
        first.train(batch)
    model = random_model("qwen2-tied", seed=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights_of(first)[name])
    second = Trainer(model, config, connect_ranks(config), version=2)
    second.load_optimizer_state(first.optimizer_state())
    for batch in batches[2:]:
        second.train(batch)
    assert all(torch.equal(weight, expected[name]) for name, weight in second.named_weights())


def test_the_optimizer_state_of_another_model_is_refused() -> None:
    config = settings()
    trainer = trainer_of(config)
    trainer.train(random_batch(0))
    other = Trainer(random_model("llama-untied"), config, connect_ranks(config))
    with pytest.raises(TrainingError, match="does not fit lm_head"):
        other.load_optimizer_state(trainer.optimizer_state())


def test_gradient_checkpointing_changes_no_result() -> None:
    batches = [random_batch(0)]
    plain, _ = trained(settings(), batches)
    checkpointed, _ = trained(settings(learner={"gradient_checkpointing": True}), batches)
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def at_temperature(rollout: Rollout, temperature: float) -> Rollout:
    """The rollout as if the untrained model had sampled it at this temperature."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    with torch.no_grad():
        logits = random_model("qwen2-tied").eval()(input_ids=ids[None]).logits[0, :-1].float() / temperature
    logp = -functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    behavior_logp = np.concatenate([np.zeros(rollout.prompt_length), logp[rollout.prompt_length - 1 :]])
    return replace(rollout, behavior_logp=behavior_logp.astype(np.float32))


def test_samples_of_another_temperature_are_on_policy_under_that_temperature() -> None:
    config = settings(solve={"temperature": 0.7}, propose={"temperature": 0.7}, flow={"max_lag": 0})
    batch = random_batch(0)
    report = trainer_of(config).train(
        replace(batch, rollouts=tuple(at_temperature(rollout, 0.7) for rollout in batch.rollouts))
    )
    assert report.kl_k1 == pytest.approx(0.0, abs=1e-5)
    assert report.ess == pytest.approx(1.0, abs=1e-4)


def test_an_entropy_bonus_raises_the_entropy() -> None:
    batches = [random_batch(version) for version in range(8)]
    batches = [replace(b, rollouts=tuple(replace(r, reward=0.0) for r in b.rollouts)) for b in batches]
    _, reports = trained(settings(learner={"entropy_weight": 1.0, "learning_rate": 1e-2}, flow={"max_lag": 0}), batches)
    assert reports[-1].entropy > reports[0].entropy


def test_dropout_stays_out_when_layers_are_computed_again() -> None:
    batches = [random_batch(0)]
    plain, _ = trained(settings(), batches)
    config = settings(learner={"gradient_checkpointing": True})
    model = random_model("qwen2-tied")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = Trainer(model, config, connect_ranks(config))
    trainer.train(batches[0])
    assert all(torch.equal(weight, plain[name]) for name, weight in trainer.named_weights())


def test_layers_that_drop_out_by_themselves_do_not_either() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    losses = []
    for is_checkpointed in (False, True):
        torch.manual_seed(3)
        model = OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, num_hidden_layers=2, dropout=0.5, **sizes))
        config = settings(learner={"gradient_checkpointing": is_checkpointed})
        losses.append(Trainer(model, config, connect_ranks(config)).train(random_batch(0)).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_model_that_cannot_compute_its_layers_again_is_refused() -> None:
    config = settings(learner={"gradient_checkpointing": True})
    model = random_model("qwen2-tied")
    model.supports_gradient_checkpointing = False
    with pytest.raises(TrainingError, match="gradient_checkpointing to false"):
        Trainer(model, config, connect_ranks(config))


def test_samples_that_weigh_nothing_are_not_computed_for_their_entropy_either() -> None:
    config = settings(learner={"propose_weight": 0.0, "entropy_weight": 0.01})
    assert trainer_of(config).train(random_batch(0)).computed_samples == 12
