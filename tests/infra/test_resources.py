"""The config's `resources` become job variables of every kind of pool; what cannot be is refused in words."""

import json
from pathlib import Path

import pytest
from tiny import tiny_config

from flows.resources import check_variables, job_variables
from stagediff.config import parse_config
from stagediff.errors import UserError
from stagediff.resources import resources_of

POOLS = Path(__file__).parents[2] / "infra" / "pools"


def parsed(**resources):
    return parse_config(tiny_config("runs/x", resources=resources)).resources


@pytest.mark.parametrize(
    ("pool_type", "expected"),
    [
        ("process", {"env": {"STAGEDIFF_RANKS": "8", "OMP_NUM_THREADS": "4"}}),
        (
            "slurm",
            {"gpus": 8, "cpus": 32, "memory": "262144M", "time_limit": "90", "env": {"STAGEDIFF_RANKS": "8", "OMP_NUM_THREADS": "4"}},
        ),
        (
            "kubernetes",
            {
                "gpus": 8,
                "cpu": "32",
                "memory": "262144Mi",
                "time_limit_seconds": 5400,
                "env": {"STAGEDIFF_RANKS": "8", "OMP_NUM_THREADS": "4"},
            },
        ),
    ],
)
def test_resources_become_job_variables(pool_type, expected):
    resources = parsed(train={"gpus": 8, "cpus": 32, "memory": "256G", "time_limit": "90m"})
    assert job_variables(resources_of("train", resources), pool_type) == expected


def test_a_step_that_is_not_named_gets_what_it_was_registered_with():
    assert job_variables(resources_of("train", {}), "slurm") == {"gpus": 1}
    assert job_variables(resources_of("diff", {}), "slurm") == {"gpus": 0}
    assert job_variables(resources_of("diff", {}), "process") == {}


def test_resources_survive_a_round_trip_through_json():
    resources = parsed(train={"gpus": 8, "memory": "256G", "time_limit": "12h"}, harvest={"parts": 4})
    body = json.loads(json.dumps({name: value.model_dump(mode="json") for name, value in resources.items()}))
    assert parsed(**body) == resources


@pytest.mark.parametrize("pool_type", ["process", "slurm", "kubernetes"])
def test_the_pools_know_every_variable_made_here(pool_type):
    template = json.loads((POOLS / f"{pool_type}.json").read_text())
    everything = {"gpus": 8, "cpus": 32, "memory": "256G", "time_limit": "2d"}
    check_variables(job_variables(everything, pool_type), template, "pool")


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"trian": {"gpus": 1}}, "'trian' is not a step"),
        ({"train": {"gpu": 1}}, "resources.train.gpu is not a setting, did you mean gpus?"),
        ({"train": {"gpus": -1}}, "resources.train.gpus is -1"),
        ({"train": {"memory": "much"}}, "'much' is no amount of memory"),
        ({"train": {"memory": 64}}, "64 has no unit"),
        ({"train": {"time_limit": 60}}, "60 has no unit"),
        ({"train": {"time_limit": "soon"}}, "'soon' is no duration"),
        ({"train": {"parts": 2}}, "only these steps can be shared out: harvest"),
        ({"diff": {"gpus": 4}}, "diff.gpus is 4, but that step runs on one device"),
        ({"train": {"nodes": 2}}, "resources.train.nodes is not a setting"),
    ],
)
def test_wrong_resources_are_refused_when_the_config_is_read(resources, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?").replace("(", r"\(")):
        parsed(**resources)


def test_more_gpus_than_the_pool_has_are_refused():
    template = json.loads((POOLS / "slurm.json").read_text())
    with pytest.raises(UserError, match="gpus is 16, but the work pool 'lab' gives a job at most 8"):
        check_variables(job_variables({"gpus": 16}, "slurm"), template, "lab")


def test_a_mistyped_variable_is_refused_with_what_was_meant():
    template = json.loads((POOLS / "slurm.json").read_text())
    with pytest.raises(UserError, match="no job variable 'partitoin'. Did you mean partition?"):
        check_variables({"partitoin": "gpu"}, template, "lab")


def test_an_unknown_type_of_pool_is_refused():
    with pytest.raises(UserError, match="'ecs' is not a type of work pool"):
        job_variables({"gpus": 1}, "ecs")
