"""The embedded engine: what it samples is what the model says, whoever else is in the batch."""

import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from azr_async.adapters.engines.embedded import EmbeddedEngine
from azr_async.errors import EngineError, WeightsError
from azr_async.messages import Completion, GenerateJob, Prompt
from tests.random_models import END, VOCABULARY, a_job, byte_tokenizer, full_pass_logp, random_model

KINDS = ["qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied"]


def an_engine(model: PreTrainedModel | None = None, **changes: object) -> EmbeddedEngine:
    settings: dict[str, object] = {"slots": 8, "context_tokens": 96}
    return EmbeddedEngine(model or random_model("qwen2-tied"), byte_tokenizer(), **(settings | changes))  # type: ignore[arg-type]


def run(engine: EmbeddedEngine, *jobs: GenerateJob) -> dict[tuple[int, int], Completion]:
    for job in jobs:
        engine.submit(job)
    completions = []
    while engine.has_work:
        completions += engine.step()
    return {(completion.job_id, completion.index): completion for completion in completions}


def a_crowd() -> list[GenerateJob]:
    """More samples than slots, all lengths different: rows join and leave at many steps."""
    return [
        a_job(number, "a b c d e f " * (number % 5) + "x", samples=1 + number % 4, max_tokens=1 + 5 * (number % 7))
        for number in range(24)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_behavior_logp_equals_a_full_forward_pass_with_joins_and_leaves(kind: str) -> None:
    model = random_model(kind)
    done = run(an_engine(model), *a_crowd())
    assert len(done) == sum(job.samples for job in a_crowd())
    for completion in done.values():
        assert_allclose(completion.behavior_logp, full_pass_logp(model, completion), atol=1e-4)


def test_a_job_gives_the_same_tokens_alone_and_in_a_crowd() -> None:
    model = random_model("qwen2-tied")
    crowd = run(an_engine(model), *a_crowd())
    for job in a_crowd():
        alone = run(an_engine(model, slots=job.samples), job)
        for place, completion in alone.items():
            assert_array_equal(completion.token_ids, crowd[place].token_ids)
            assert completion.text == crowd[place].text


def test_samples_of_one_prompt_differ() -> None:
    done = run(an_engine(), a_job(samples=8))
    assert len({completion.token_ids.tobytes() for completion in done.values()}) == 8


def test_greedy_follows_the_largest_logit_with_logp_zero() -> None:
    model = random_model("llama-tied")
    (completion,) = run(an_engine(model), a_job(temperature=0.0)).values()
    ids = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int64))
    with torch.no_grad():
        largest = model(input_ids=ids[None]).logits[0, :-1].argmax(-1).numpy()
    assert_array_equal(largest[len(completion.prompt_ids) - 1 :], completion.token_ids)
    assert_array_equal(completion.behavior_logp, np.zeros(len(completion.token_ids)))


def test_temperature_is_in_the_logp() -> None:
    model = random_model("qwen2-untied")
    done = run(an_engine(model), *[a_job(n, temperature=0.5 + n / 4, seed=3) for n in range(4)])
    for (number, _), completion in done.items():
        assert_allclose(completion.behavior_logp, full_pass_logp(model, completion, 0.5 + number / 4), atol=1e-4)


def test_a_tiny_nucleus_is_greedy_sampling_with_certainty() -> None:
    model = random_model("qwen2-tied")
    (nucleus,) = run(an_engine(model), a_job(top_p=1e-6)).values()
    (greedy,) = run(an_engine(model), a_job(temperature=0.0)).values()
    assert_array_equal(nucleus.token_ids, greedy.token_ids)
    assert_allclose(nucleus.behavior_logp, 0.0, atol=1e-6)


def test_a_nucleus_raises_the_logp_of_what_it_keeps() -> None:
    model = random_model("qwen2-tied")
    done = run(an_engine(model), a_job(samples=8, top_p=0.5))
    for completion in done.values():
        assert (completion.behavior_logp >= full_pass_logp(model, completion) - 1e-5).all()
        assert completion.behavior_logp.mean() > full_pass_logp(model, completion).mean() + 0.3


def test_an_answer_ends_at_the_end_token_which_is_recorded_but_not_shown() -> None:
    done = run(an_engine(context_tokens=250), a_job(samples=24, max_tokens=200))
    ended = [completion for completion in done.values() if completion.finish == "stop"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == END
        assert END not in completion.token_ids[:-1]
        assert "<eos>" not in completion.text


def test_max_tokens_ends_an_answer() -> None:
    done = run(an_engine(), a_job(samples=4, max_tokens=5))
    assert {len(completion.token_ids) for completion in done.values() if completion.finish == "length"} == {5}


def test_a_stop_text_ends_the_answer_and_stays_in_it() -> None:
    tokenizer = byte_tokenizer()
    plain = run(an_engine(context_tokens=250), a_job(samples=16, max_tokens=200))
    # Any two characters that were really written next to each other will do, if whole: these bytes are often not.
    stop = next(iter(re.findall(r"[!-~]{2}", "\n".join(completion.text for completion in plain.values()))))
    done = run(
        an_engine(context_tokens=250), a_job(samples=16, max_tokens=200, prompt=Prompt(text="hello", stop=(stop,)))
    )
    assert any(stop in completion.text for completion in done.values())
    for place, completion in done.items():
        expected = plain[place].text
        assert completion.text == (expected[: expected.index(stop) + len(stop)] if stop in expected else expected)
        assert completion.finish == ("stop" if stop in expected else plain[place].finish)
        assert tokenizer.decode(completion.token_ids, skip_special_tokens=True).startswith(completion.text)


def test_special_tokens_show_only_when_asked_for() -> None:
    model = random_model("qwen2-untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely, so `<pad>` comes up
    hidden = run(an_engine(model), a_job(samples=24, max_tokens=60))
    shown = run(
        an_engine(model), a_job(samples=24, max_tokens=60, prompt=Prompt(text="hello", keep_special_tokens=True))
    )
    assert not any("<pad>" in completion.text for completion in hidden.values())
    assert any("<pad>" in completion.text for completion in shown.values())
    assert not any("<eos>" in completion.text for completion in shown.values())


def test_a_chat_prompt_goes_through_the_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "[{{ messages[0].role }}|{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    )
    engine = EmbeddedEngine(random_model("qwen2-tied"), tokenizer, slots=2, context_tokens=96)
    (completion,) = run(engine, a_job(prompt=Prompt(text="hi", is_chat=True))).values()
    assert tokenizer.decode(completion.prompt_ids) == "[user|hi]>"


def test_a_chat_prompt_without_a_template_says_what_to_set() -> None:
    with pytest.raises(EngineError, match=r"Set model.dialogue to azr-base"):
        an_engine().submit(a_job(prompt=Prompt(text="hi", is_chat=True)))


def test_a_prompt_that_leaves_no_room_comes_back_at_once_and_empty() -> None:
    done = run(an_engine(), a_job(text="x" * 85, max_tokens=12, samples=2), a_job(1, text="x" * 84, max_tokens=12))
    assert [done[0, n].finish for n in (0, 1)] == ["prompt_too_long"] * 2
    assert len(done[0, 1].token_ids) == len(done[0, 1].behavior_logp) == len(done[0, 1].token_version) == 0
    assert done[1, 0].finish in ("stop", "length")


def test_old_groups_go_first() -> None:
    engine = an_engine(slots=1)
    for job_id, priority in ((0, 9), (5, 1), (4, 1), (7, 0)):
        engine.submit(a_job(job_id, priority=priority, max_tokens=2))
    order = []
    while engine.has_work:
        order += [completion.job_id for completion in engine.step()]
    assert order == [7, 4, 5, 0]


def test_an_ended_sequence_makes_room_in_the_next_step() -> None:
    engine = an_engine(slots=2)
    for job_id in range(6):
        engine.submit(a_job(job_id, max_tokens=1))
    assert [len(engine.step()) for _ in range(3)] == [2, 2, 2]


def test_the_cache_moves_back_when_it_reaches_the_wall() -> None:
    model = random_model("qwen2-tied")
    engine = an_engine(model, slots=4, context_tokens=24)
    done = run(engine, *[a_job(number, "abcdefgh", max_tokens=4 + number % 12) for number in range(60)])
    assert len(done) == 60
    for completion in done.values():
        assert_allclose(completion.behavior_logp, full_pass_logp(model, completion), atol=1e-4)


def test_a_job_that_makes_no_sense_is_refused() -> None:
    engine = an_engine()
    for changes in ({"samples": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"text": ""}):
        with pytest.raises(EngineError):
            engine.submit(a_job(**changes))  # type: ignore[arg-type]
    assert not engine.has_work


def test_totals_count_every_token() -> None:
    engine = an_engine()
    done = run(engine, *a_crowd())
    assert engine.generated_tokens == sum(len(completion.token_ids) for completion in done.values())
    assert engine.busy_seconds > 0


def install_all(engine: EmbeddedEngine, model: PreTrainedModel, version: int) -> None:
    engine.begin_update()
    for name, parameter in model.named_parameters():
        engine.install([(name, parameter.detach())])
    engine.finish_update(version)


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_makes_every_span_agree_with_the_weights_of_its_version(kind: str) -> None:
    policies = [random_model(kind, seed) for seed in range(4)]
    engine = an_engine(random_model(kind, 0), on_new_weights="recompute")
    for job in a_crowd():
        engine.submit(job)
    completions, steps = [], 0
    while engine.has_work:
        completions += engine.step()
        steps += 1
        if steps % 9 == 0 and engine.version < 3:
            install_all(engine, policies[engine.version + 1], engine.version + 1)
    assert {int(version) for done in completions for version in done.token_version} == {0, 1, 2, 3}
    assert any(len(set(done.token_version.tolist())) > 1 for done in completions)
    for done in completions:
        by_version = np.stack([full_pass_logp(policy, done) for policy in policies])
        expected = by_version[done.token_version, np.arange(len(done.token_version))]
        assert_allclose(done.behavior_logp, expected, atol=1e-4)


def test_keep_samples_with_new_weights_on_the_old_cache() -> None:
    old, new = random_model("qwen2-tied", 0), random_model("qwen2-tied", 1)
    engine = an_engine(random_model("qwen2-tied", 0), on_new_weights="keep")
    engine.submit(a_job(max_tokens=20, seed=5))
    for _ in range(6):
        engine.step()
    install_all(engine, new, 1)
    (done,) = run(engine).values()
    before = done.token_version == 0
    assert 0 < before.sum() < len(before)
    assert_allclose(done.behavior_logp[before], full_pass_logp(old, done)[before], atol=1e-4)
    assert np.abs(done.behavior_logp - full_pass_logp(new, done))[~before].max() > 1e-3


def test_restart_gives_every_sequence_to_one_version() -> None:
    new = random_model("qwen2-tied", 1)
    engine = an_engine(random_model("qwen2-tied", 0), on_new_weights="restart")
    for job in a_crowd():
        engine.submit(job)
    completions = [completion for _ in range(9) for completion in engine.step()]
    install_all(engine, new, 1)
    completions += run(engine).values()
    assert {(done.job_id, done.index) for done in completions} == {
        (j.job_id, n) for j in a_crowd() for n in range(j.samples)
    }
    for done in completions:
        assert len(set(done.token_version.tolist())) == 1
        if done.token_version[0] == 1:
            assert_allclose(done.behavior_logp, full_pass_logp(new, done), atol=1e-4)


def test_a_cancelled_job_leaves_and_the_others_stay_as_they_were() -> None:
    undisturbed = run(an_engine(), *a_crowd())
    engine = an_engine()
    for job in a_crowd():
        engine.submit(job)
    completions = [completion for _ in range(6) for completion in engine.step()]
    gone = {completion.job_id for completion in completions}
    for job_id in (1, 2, 3, 20, 999):
        engine.cancel(job_id)
    completions += run(engine).values()
    after = [completion for completion in completions if completion.job_id not in gone]
    assert not {completion.job_id for completion in after} & {1, 2, 3, 20}
    assert {completion.job_id for completion in after} >= set(range(4, 20)) - gone
    for completion in completions:
        assert_array_equal(completion.token_ids, undisturbed[completion.job_id, completion.index].token_ids)


def test_new_weights_are_what_is_sampled_from_and_scored() -> None:
    new = random_model("llama-untied", 1)
    engine = an_engine(random_model("llama-untied", 0))
    run(engine, a_job())
    install_all(engine, new, 1)
    (done,) = run(engine, a_job(1)).values()
    ids = np.concatenate([done.prompt_ids, done.token_ids])
    assert_allclose(done.behavior_logp, full_pass_logp(new, done), atol=1e-4)
    assert_allclose(engine.score([ids])[len(done.prompt_ids) - 1 :], done.behavior_logp, atol=1e-4)


def test_scores_of_unequal_sequences_are_joined_in_order() -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(2, VOCABULARY, length).astype(np.int32) for length in (9, 1, 30, 2)]
    engine = an_engine()
    together = engine.score(sequences)
    assert len(together) == 8 + 0 + 29 + 1
    assert_allclose(together, np.concatenate([engine.score([ids]) for ids in sequences]), atol=1e-5)
    assert len(engine.score([])) == 0


def test_weights_that_do_not_fit_are_refused() -> None:
    engine = an_engine()
    engine.begin_update()
    with pytest.raises(WeightsError, match="no such parameter"):
        engine.install([("model.nonsense", torch.zeros(1))])
    with pytest.raises(WeightsError, match="shape"):
        engine.install([("model.norm.weight", torch.zeros(1))])
    with pytest.raises(WeightsError, match="came without"):
        engine.finish_update(1)


def test_weights_that_are_not_finite_stop_the_engine_by_name() -> None:
    model = random_model("qwen2-tied")
    engine = an_engine(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    engine.submit(a_job())
    with pytest.raises(EngineError, match="version 0"):
        engine.step()


def test_a_sliding_window_shorter_than_the_context_is_refused() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        sliding_window=16,
    )
    with pytest.raises(EngineError, match=r"Lower engine.context_tokens to 16"):
        an_engine(MistralForCausalLM(config))
    run(an_engine(MistralForCausalLM(config), context_tokens=16), a_job(max_tokens=4))


def test_a_model_with_learned_positions_is_served_as_well() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96)).eval()
    for completion in run(an_engine(model), *a_crowd()).values():
        assert_allclose(completion.behavior_logp, full_pass_logp(model, completion), atol=1e-4)


def test_a_model_without_keys_and_values_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(EngineError, match=r"MambaForCausalLM .* Choose"):
        an_engine(MambaForCausalLM(config))


def test_bfloat16_stays_near_a_full_forward_pass() -> None:
    model = random_model("llama-tied").bfloat16()
    for completion in run(an_engine(model), *a_crowd()).values():
        assert_allclose(completion.behavior_logp, full_pass_logp(model, completion), atol=0.3)
