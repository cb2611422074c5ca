"""What config.json says that makes no model is refused before anything is computed with it."""

import json

import pytest

from quantkit.checkpoint.index import open_checkpoint
from quantkit.errors import RefusedError
from tests.tiny import VARIANTS, make_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("numbers") / "m", "mistral")


def opened(folder, tmp_path, changes):
    """The checkpoint with other words in its config.json; weights are the same files."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "absent"})
    )
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"rope_parameters": {"rope_type": "default", "rope_theta": theta}}, "rope_theta")
            for theta in (0, -1.0, NAN, INFINITE, True, "x")
        ),
        ({"rope_parameters": "absent", "rope_theta": 0.0}, "rope_theta = 0.0, which is no number above 0"),
        *(({"rope_parameters": {"rope_type": "linear", "factor": factor}}, "factor") for factor in (0.0, -2.0, NAN)),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn', but no factor"),
        ({"rope_parameters": "absent", "rope_scaling": {"type": "dynamic", "factor": 0}}, "factor = 0"),
        ({"rope_parameters": LLAMA3 | {"factor": 0}}, "factor = 0"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0, which is not below"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "but no low_freq_factor"),
        ({"rope_parameters": [1]}, "rope_parameters = [1], which is no table"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type = ['yarn'], which is no name"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta = 500000.0 and, within"),
        *(({"rms_norm_eps": eps}, "rms_norm_eps") for eps in (0, -1e-5, NAN, 1e9, "x")),
        *(({"sliding_window": window}, "sliding_window") for window in (0, -1, 2.5, True)),
        ({"num_key_value_heads": 3}, "cannot share 3 key heads"),
        ({"head_dim": 15}, "a head of 15 numbers cannot be turned in pairs"),
        ({"model_type": ["mistral"]}, "unknown architecture: model_type is ['mistral']"),
    ],
    ids=str,
)
def test_a_number_that_makes_no_model(model, tmp_path, changes, said):
    with pytest.raises(RefusedError) as caught:
        opened(model, tmp_path, changes)
    assert said in caught.value.what
    assert caught.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "absent", "rope_theta": "absent"},
        {"rope_parameters": None, "rope_theta": 10000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 10000},
        {"rope_parameters": LLAMA3},
        {"sliding_window": None},
        {"sliding_window": 0, "use_sliding_window": False},
        {"rms_norm_eps": "absent"},
    ],
    ids=str,
)
def test_what_readers_understand_is_taken(model, tmp_path, changes):
    assert opened(model, tmp_path, changes).num_layers > 0


@pytest.mark.parametrize("model_type", VARIANTS)
def test_every_family_makes_a_model(model_type, tmp_path):
    make_tiny(tmp_path / "m", model_type, **VARIANTS[model_type])
    open_checkpoint(tmp_path / "m")
