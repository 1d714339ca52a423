"""The recipe: defaults are the contract's, and everything else is refused by name."""

import json

import pytest

from rewriter.errors import ErrorCode, QatError
from rewriter.recipe import Recipe


def test_an_empty_recipe_has_the_documented_defaults():
    recipe = Recipe.parse({})
    assert (recipe.weight_bits, recipe.activation_bits) == (8, 8)
    assert not recipe.symmetric
    assert recipe.per_channel
    assert recipe.ranges == "learned"
    assert (recipe.quant_delay, recipe.freeze_bn_delay) == (0, None)
    assert recipe.batch_norm == "fold_training"
    assert recipe.target == "onnxruntime"
    assert recipe.calibration.method == "mse"
    assert recipe.loss == "cross_entropy"
    assert recipe.optimizer == "adamw"


def test_json_text_and_mapping_give_the_same_recipe():
    fields = {"weight_bits": 4, "overrides": [{"match": "Conv", "quantize": False}], "frozen": ["embeddings"]}
    as_text = (
        '{"weight_bits": 4, "overrides": [{"match": "Conv", "quantize": false}], "frozen": ["embeddings"]}'
    )
    assert Recipe.parse(fields) == Recipe.parse(as_text)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weight_bitz": 8}, "weight_bitz"),
        ({"weight_bits": "8"}, "weight_bits"),
        ({"weight_bits": True}, "weight_bits"),
        ({"weight_bits": 1}, "weight_bits"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"weight_bits": 4.5}, "weight_bits"),
        ({"activation_bits": 17}, "activation_bits"),
        ({"symmetric": 1}, "symmetric"),
        ({"ranges": "trained"}, "ranges"),
        ({"quant_delay": -1}, "quant_delay"),
        ({"quant_delay": 10, "freeze_bn_delay": 5}, "freeze_bn_delay"),
        ({"overrides": [{"match": "Conv", "bits": 4}]}, "overrides.0.bits"),
        ({"overrides": [{"match": ""}]}, "overrides.0.match"),
        ({"calibration": {"method": "entropy"}}, "calibration.method"),
        ({"loss": {"name": "loss"}}, None),
    ],
)
def test_a_wrong_field_is_named(fields, field):
    with pytest.raises(QatError) as caught:
        Recipe.parse(fields)
    assert caught.value.code == ErrorCode.RECIPE_INVALID
    if field is not None:
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scope": "a\0b"}, "scope"),
        ({"frozen": ["a", "b\n"]}, "frozen.1"),
        ({"overrides": [{"match": "\x7f"}]}, "overrides.0.match"),
        ({"loss": {"output": "\x1b[2J"}}, "loss.output"),
    ],
)
def test_names_have_no_control_characters(fields, field):
    for settings in (fields, json.dumps(fields)):
        with pytest.raises(QatError, match="control characters") as caught:
            Recipe.parse(settings)
        assert (caught.value.code, caught.value.field) == (ErrorCode.RECIPE_INVALID, field)
    assert Recipe.parse({"scope": "日本 語/ß:0"}).scope == "日本 語/ß:0"


def test_what_is_wrong_is_said_without_the_words_of_the_parser():
    with pytest.raises(QatError, match=r"^The recipe is not valid: freeze_bn_delay must"):
        Recipe.parse({"quant_delay": 10, "freeze_bn_delay": 5})


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"weight_bits": NaN}'])
def test_text_that_is_not_a_json_object_is_refused(text):
    with pytest.raises(QatError) as caught:
        Recipe.parse(text)
    assert caught.value.code == ErrorCode.RECIPE_INVALID


def test_what_this_version_cannot_do_is_said_and_not_ignored():
    with pytest.raises(QatError) as caught:
        Recipe.parse({"target": "tensorrt"})
    assert caught.value.code == ErrorCode.RECIPE_UNSUPPORTED
    assert caught.value.field == "target"


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_delay": 100, "freeze_bn_delay": 100},
        {"ranges": "moving_average", "fold_statistics": "float_layer", "step_counter": "optimizer_steps"},
        {"target": "tf_contrib", "symmetric": True, "per_channel": False},
        {"activation_bits": 16, "overrides": [{"match": "Add", "activation_bits": 12, "ranges": "fixed"}]},
        {"overrides": [{"match": "head", "quant_delay": 5, "freeze_bn_delay": 9, "batch_norm": "keep"}]},
    ],
)
def test_the_training_semantics_of_tf_contrib_are_there(fields):
    recipe = Recipe.parse(fields)
    assert recipe.model_dump(mode="json", exclude_unset=True) == fields


def test_delays_end_where_the_float32_counter_counts_exactly():
    assert Recipe.parse({"quant_delay": 2**24}).quant_delay == 2**24
    with pytest.raises(QatError) as caught:
        Recipe.parse({"quant_delay": 2**24 + 1})
    assert caught.value.field == "quant_delay"


def test_an_override_may_not_freeze_before_it_quantizes():
    override = {"match": "head", "quant_delay": 10}
    with pytest.raises(QatError, match=r"overrides\.0") as caught:
        Recipe.parse({"freeze_bn_delay": 5, "overrides": [override]})
    assert caught.value.field == "freeze_bn_delay"


@pytest.mark.parametrize(
    ("loss", "field"),
    [("nope", "loss"), (3, "loss"), ({"output": ""}, "loss.output"), ({"x": 1}, "loss.output")],
)
def test_a_wrong_loss_is_named_without_the_forms_it_could_have(loss, field):
    with pytest.raises(QatError) as caught:
        Recipe.parse({"loss": loss})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scope": "x" * 1025}, "scope"),
        ({"frozen": ["x" * 1025]}, "frozen.0"),
        ({"frozen": ["x"] * 1025}, "frozen"),
        ({"overrides": [{"match": "x" * 1025}]}, "overrides.0.match"),
        ({"overrides": [{"match": "x"}] * 1025}, "overrides"),
        ({"loss": {"output": "x" * 1025}}, "loss.output"),
        ({"frozen": ["x" * 1000] * 70}, "frozen"),
        ({"overrides": [{"match": "\u00e9" * 1000}] * 40, "frozen": ["encoder"]}, "overrides"),
    ],
)
def test_a_recipe_has_a_largest_size(fields, field):
    with pytest.raises(QatError) as caught:
        Recipe.parse(fields)
    assert (caught.value.code, caught.value.field) == (ErrorCode.RECIPE_INVALID, field)


def test_a_recipe_takes_hundreds_of_long_names():
    frozen = [f"encoder/layer_{number}/attention/self/query/MatMul" for number in range(1000)]
    overrides = [{"match": f"/model/block.{number}/conv", "weight_bits": 4} for number in range(40)]
    assert len(Recipe.parse({"frozen": frozen, "overrides": overrides}).frozen) == 1000


def test_a_recipe_made_in_python_has_the_same_largest_size():
    with pytest.raises(ValueError, match="frozen makes it larger than 65536 bytes"):
        Recipe(frozen=("x" * 1000,) * 70)
