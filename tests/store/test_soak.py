"""Many kills on many stores: `make soak`. Prints what was killed and what was computed twice."""

import random
import time

import pytest
from test_crashes import assert_whole, undisturbed
from toystep import SAVE_EVERY, ToySpec


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_forty_kills_change_no_byte(root, runner, tmp_path, seed):
    spec = ToySpec(seed=seed, rows=3600, pause=0.03)
    kills = runner.kill_often(root, 40, seed, most=6, spec=spec)
    assert_whole(root, spec, undisturbed(tmp_path, spec))
    computed = runner.computed("shard")
    print(f"{root}: {kills} kills, {len(computed) - len(set(computed))} of {len(set(computed))} shards computed twice")
    assert len(computed) <= len(set(computed)) + kills


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_two_racing_workers_killed_in_turn_change_no_byte(root, runner, tmp_path, seed):
    spec = ToySpec(seed=seed, rows=7200, pause=0.03)
    rng, kills = random.Random(seed), 0
    workers = [runner.start(root, spec=spec) for _ in range(2)]
    while kills < 42 and all(w.poll() is None for w in workers):
        time.sleep(rng.uniform(0, 0.5))
        i = rng.randrange(2)
        workers[i].kill()
        workers[i].communicate()
        kills += 1
        workers[i] = runner.start(root, spec=spec)
    for worker in workers:
        runner.finish(worker)
    assert_whole(root, spec, undisturbed(tmp_path, spec))
    computed = runner.computed("shard")
    print(f"{root}: {kills} kills of two workers, {len(computed) - len(set(computed))} of {len(set(computed))} shards computed twice")
    assert kills > 10
    assert len(computed) <= len(set(computed)) + kills


@pytest.mark.soak
def test_a_training_killed_fifteen_times_is_bit_identical(root, runner, tmp_path):
    spec = ToySpec(rows=48, train_steps=120, pause=0.05)
    kills = runner.kill_often(root, 15, seed=1, most=12, spec=spec)
    assert_whole(root, spec, undisturbed(tmp_path, spec))
    steps = runner.computed("train")
    print(f"{root}: {kills} kills, {len(steps) - len(set(steps))} of {len(set(steps))} training steps computed twice")
    assert sorted(set(steps)) == list(range(120))
    assert len(steps) <= 120 + kills * SAVE_EVERY
