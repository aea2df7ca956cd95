"""Where the randomness of a generation job comes from."""

from azr_async.algorithm.jobs import generation_job, job_seed, loop_seed
from azr_async.messages import ROLES, GenerateJob, Prompt, Role


def test_a_run_from_its_start_draws_by_the_seed_of_the_run() -> None:
    assert loop_seed(7, start_version=0) == 7


def test_seeds_differ_by_run_resumed_version_role_and_group() -> None:
    loops = [loop_seed(run, version) for run in range(4) for version in (0, 60, 120)]
    seeds = {job_seed(loop, role, group) for loop in loops for role in ROLES for group in range(-20, 20)}
    assert len(seeds) == len(loops) * len(ROLES) * 40
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_resuming_twice_at_the_same_version_draws_the_same() -> None:
    assert loop_seed(7, start_version=60) == loop_seed(7, start_version=60)


def test_older_groups_go_first_and_no_two_jobs_share_a_number() -> None:
    def job(role: Role, group_id: int) -> GenerateJob:
        prompt = Prompt(text="")
        return generation_job(role, group_id, prompt, samples=1, temperature=1.0, top_p=1.0, max_tokens=1, seed=1)

    jobs = [job(role, group_id) for group_id in range(-3, 4) for role in ROLES]
    assert sorted(jobs, key=lambda one: one.priority) == jobs
    assert len({one.job_id for one in jobs}) == len({one.seed for one in jobs}) == len(jobs)
