"""Profiles: what is shipped is what the formulas say, and a file that is none is named with the field at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.cluster.simulator.roofline import H200, LLAMA_8B, LLAMA_70B, derive, shipped
from quire.cluster.simulator.speed_profile import ProfileError, load, parse, shipped_names


@pytest.mark.parametrize("profile", shipped(), ids=lambda p: p.name)
def test_what_is_shipped_is_what_the_formulas_say(profile: Any) -> None:
    assert load(profile.name) == profile
    assert profile.derived
    assert parse(profile.to_json()) == profile


def test_every_shipped_file_is_derived_here() -> None:
    assert shipped_names() == sorted(profile.name for profile in shipped())


def test_the_shapes_have_the_parameters_that_their_names_say() -> None:
    for model, billions in ((LLAMA_8B, 8.03), (LLAMA_70B, 70.55)):
        assert (model.linear_parameters + 2 * model.head_parameters) / 1e9 == pytest.approx(billions, rel=0.002)


def test_steps_are_what_the_rates_allow() -> None:
    step = derive("x", H200, LLAMA_8B, 1).step
    weights_s = 2 * (LLAMA_8B.linear_parameters + LLAMA_8B.head_parameters) / (4.8e12 * 0.8)
    assert step.step_s(0, 0, 1, 0, 1) == pytest.approx(0.0005 + weights_s + step.sequence_s)
    assert step.step_s(0, 0, 1, 131_072, 1) - step.step_s(0, 0, 1, 0, 1) == pytest.approx(131_072 * 131_072 / (4.8e12 * 0.8))
    a_token_s = step.step_s(2001, 0, 0, 0, 1) - step.step_s(2000, 0, 0, 0, 1)
    assert a_token_s == pytest.approx(2 * LLAMA_8B.linear_parameters / (989e12 * 0.6))
    eight = derive("y", H200, LLAMA_70B, 8).step
    four = derive("z", H200, LLAMA_70B, 4).step
    assert 0.5 < eight.step_s(0, 0, 8, 8000, 8) / four.step_s(0, 0, 8, 8000, 8) < 0.7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": {"base_s": 0.1}}, "token_s"),
        ({"step": {"base_s": -1, "token_s": 1}}, "step.base_s must be a number of at least 0"),
        ({"step": {"base_s": 0, "token_s": 0}}, "a step must take time"),
        ({"step": {"base_s": 0, "token_s": 1, "speed": 2}}, "step.speed is unknown"),
        ({"replica": {"pages": 1.5}}, "replica.pages must be a whole number of at least 1"),
        ({"replica": {"pages": True}}, "replica.pages"),
        ({"replica": {"pages": 10, "max_running": 600}}, "max_running must be at most"),
        ({"derived": 1}, "derived must be a bool"),
        ({"more": 1}, "profile.more is unknown"),
        ({"replica": None}, "replica must be an object"),
    ],
)
def test_a_wrong_profile_names_what_is_wrong(change: dict[str, Any], says: str) -> None:
    good = {"name": "x", "derived": False, "step": {"base_s": 0.1, "token_s": 0.001}, "replica": {"pages": 10}}
    assert parse(json.dumps(good)).replica.pages == 10
    with pytest.raises(ProfileError, match=says):
        parse(json.dumps({**good, **change}))


def test_a_missing_file_names_those_that_are_shipped() -> None:
    with pytest.raises(ProfileError, match="h200-llama-8b"):
        load("/nothing.json")
    with pytest.raises(ProfileError, match="not JSON"):
        parse("{")
