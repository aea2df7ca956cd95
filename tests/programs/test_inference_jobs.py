"""Jobs of a self-play that is gone are dropped, and nothing of them passes for a job of the next one."""

from dataclasses import replace

from azr_async.messages import CancelJob, Completion, GenerateJob, GenerationResults
from azr_async.programs.inference_jobs import Jobs
from tests.completions import a_completion
from tests.random_models import a_job


def completion(job: GenerateJob | CancelJob, index: int = 0) -> Completion:
    return replace(a_completion(), job_id=job.job_id, index=index)


def results(*completions: Completion, seconds: float = 1.0, tokens: int = 10) -> GenerationResults:
    return GenerationResults(
        worker="inference-0", completions=completions, busy_seconds=seconds, generated_tokens=tokens
    )


def ids(made: GenerationResults) -> list[tuple[int, int]]:
    return [(one.job_id, one.index) for one in made.completions]


def test_the_first_self_play_has_its_own_numbers_in_the_engine_too() -> None:
    jobs = Jobs()
    assert jobs.order(a_job(-3)) == a_job(-3)
    made = results(completion(a_job(-3)))
    assert ids(jobs.results(made)) == [(-3, 0)]
    assert jobs.results(made).busy_seconds == made.busy_seconds


def test_what_is_still_made_of_an_old_job_is_not_for_the_next_self_play() -> None:
    jobs = Jobs()
    old, done = jobs.order(a_job(7, samples=2)), jobs.order(a_job(8))
    jobs.results(results(completion(old, 0), completion(done)))
    assert jobs.forget() == [CancelJob(job_id=old.job_id)]
    new = jobs.order(a_job(7, samples=2))
    assert new.job_id != old.job_id
    assert ids(jobs.results(results(completion(old, 1), completion(new, 0)))) == [(7, 0)]
    assert jobs.order(CancelJob(job_id=7)) == CancelJob(job_id=new.job_id)
    assert jobs.forget() == []


def test_totals_begin_anew_with_the_next_self_play() -> None:
    jobs = Jobs()
    jobs.results(results(seconds=5.0, tokens=100))
    jobs.forget()
    later = jobs.results(results(seconds=7.0, tokens=130))
    assert (later.busy_seconds, later.generated_tokens) == (2.0, 30)
