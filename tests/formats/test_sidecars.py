"""config.json of an artifact, for readers of either generation."""

import pytest

from quantkit.formats.sidecars import quantized_config

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, 10000.0, None),
        ({"rope_parameters": {**YARN, "type": "yarn", "rope_theta": 1e6}}, 1e6, YARN),
        ({"rope_theta": 1e6, "rope_scaling": {**YARN, "type": "yarn"}}, 1e6, YARN),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e6, {"type": "yarn", "factor": 4.0}),
    ],
)
def test_the_rope_is_said_in_both_spellings_and_once_in_each(rope, theta, scaling):
    source = {"model_type": "mistral", **rope}
    config = quantized_config(source, {}, "float16")
    assert config["rope_theta"] == theta
    assert config.get("rope_scaling") == scaling
    assert config["rope_parameters"].get("rope_theta") or not rope.get("rope_theta")
    assert source == {"model_type": "mistral", **rope}, "the source's own stays as it is"


def test_a_source_without_any_rope_is_left_without():
    assert "rope_theta" not in quantized_config({"model_type": "mistral"}, None, "float16")
