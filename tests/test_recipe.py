"""Recipes: every problem at once, in words that say what to do."""

import shutil
import tomllib

import pytest
import typer

from quantkit.cli.output import fail
from quantkit.cli.recipes import check
from quantkit.errors import RefusedError, RunFailedError
from quantkit.home import shipped
from quantkit.recipe import REPO_RULES, Recipe, is_on_hub, is_repository, require_pinned
from quantkit.recipe_files import (
    as_toml,
    copy_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
    model_named_in,
    pin_recipe,
)

GOOD = 'format = "gptq"\n[model]\nid = "bielik-nano"\n'
NO_REPOSITORIES = ("my-org/--x", "an-org/a..b", "an-org/x.git", "an-org/" + "x" * 97, "żółw/a")


def write(tmp_path, text, name="r.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_recipe_is_good():
    names = list_recipes()
    assert "bielik-7b-instruct-v0.1/gptq" in names
    assert "bielik-nano/gptq" in names
    for name in names:
        recipe = load_recipe(find_recipe(name))
        gates = recipe.validation.gates
        assert all(limit is not None for limit in gates.model_dump().values()), name
    assert len(names) >= 3


def test_four_errors_at_once(tmp_path):
    path = write(
        tmp_path,
        'format = "gptq"\n[model]\nid = "a/b"\nrevision = "main"\n'
        '[quantize]\nbits = 5\ndamping = "0.01"\ngroupsize = 128\n',
    )
    with pytest.raises(RefusedError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        "4 problem(s) in the recipe:\n"
        "  model.revision: String should match pattern '^[0-9a-f]{40}$', got 'main'\n"
        "  quantize.bits: Input should be 2, 3, 4 or 8, got 5\n"
        "  quantize.damping: Input should be a valid number, got '0.01'\n"
        "  quantize.groupsize: unknown key; did you mean 'group_size'?\n"
        f"  at:  {path}\n"
        "  fix: docs/recipe.md lists every key; `quantkit recipes schema` prints the schema"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["polish-core", "nkjp1m"]', {"polish-core": "all", "nkjp1m": "all"}),
        ('{ "polish-core" = "all", "nkjp1m" = 100 }', {"polish-core": "all", "nkjp1m": 100}),
    ],
)
def test_validation_texts_are_a_list_or_a_table(tmp_path, value, expected):
    recipe = load_recipe(write(tmp_path, GOOD + f"[validation]\ntexts = {value}\n"))
    assert recipe.validation.texts == expected
    assert recipe.resolved()["validation"]["texts"] == expected
    assert Recipe.of(recipe.resolved()) == recipe


@pytest.mark.parametrize("value", ["0", "-1", "true", '"some"', "1.5"])
def test_a_sample_of_no_windows_is_refused(tmp_path, value):
    with pytest.raises(RefusedError) as caught:
        load_recipe(write(tmp_path, GOOD + f'[validation]\ntexts = {{ "nkjp1m" = {value} }}\n'))
    (line,) = caught.value.what.splitlines()[1:]
    assert line.startswith('  validation.texts.nkjp1m: Input should be "all" or a number of windows from 1 up, got ')


LARGE = (
    "bielik-7b-instruct-v0.1",
    "bielik-11b-v2.3-instruct",
    "bielik-4.5b-v3.0-instruct",
    "bielik-1.5b-v3.0-instruct",
)


@pytest.mark.parametrize("model", LARGE)
def test_large_models_are_judged_on_all_our_text_and_a_sample_of_nkjp(model):
    names = [name for name in list_recipes() if name.startswith(f"{model}/")]
    assert len(names) >= 6
    for name in names:
        section = load_recipe(find_recipe(name)).validation
        assert section.texts == {"polish-core": "all", "nkjp1m": 100}, name
        assert section.window_tokens == 2048, name


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(RefusedError, match=r"(?s)format: required.*model: required"):
        load_recipe(write(tmp_path, "[quantize]\nbits = 4\n"))


def test_extends_continues_tables_and_replaces_text_sets(tmp_path):
    write(tmp_path, GOOD + '[calibration]\nseed = 7\ntexts = { "polish-core" = 3 }\n', "base.toml")
    child = write(tmp_path, 'extends = "base.toml"\n[calibration]\ntexts = { "own.txt" = 2 }\n[quantize]\nbits = 3\n')
    recipe = load_recipe(child)
    assert (recipe.calibration.seed, recipe.calibration.texts, recipe.quantize.bits) == (7, {"own.txt": 2}, 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("nope.toml", "the recipe extends 'nope.toml', which is not there"),
        ("", "the recipe extends '', which cannot be read: Is a directory"),
        (".", "the recipe extends '.', which cannot be read: Is a directory"),
        ("folder", "the recipe extends 'folder', which cannot be read: Is a directory"),
        ("r.toml/x", "the recipe extends 'r.toml/x', which cannot be read: Not a directory"),
        (r"a\u0000b", r"the recipe extends 'a\x00b', which cannot be read: embedded null byte"),
        ("a" * 300, f"the recipe extends '{'a' * 300}', which cannot be read: File name too long"),
    ],
)
def test_extends_what_is_no_recipe(tmp_path, said, expected):
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, f'extends = "{said}"\n')
    with pytest.raises(RefusedError) as caught:
        load_recipe(path)
    assert (caught.value.what, caught.value.where) == (expected, str(path))
    assert caught.value.fix


def test_extends_in_a_circle(tmp_path):
    write(tmp_path, 'extends = "b.toml"\n', "a.toml")
    write(tmp_path, 'extends = "a.toml"\n', "b.toml")
    with pytest.raises(RefusedError, match="goes in a circle"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("quantize.bits=3", ("quantize", "bits", 3)),
        ("quantize.order=natural", ("quantize", "order", "natural")),
        ('calibration.texts={"polish-core"=5}', ("calibration", "texts", {"polish-core": 5})),
        ("quantize.skip=['mlp.down_proj']", ("quantize", "skip", ("mlp.down_proj",))),
    ],
)
def test_set_changes_one_key(tmp_path, change, expected):
    section, key, value = expected
    recipe = load_recipe(write(tmp_path, GOOD), (change,))
    assert getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("9" * 5000, "the value of --set quantize.bits is not TOML: "),
        ("[" * 3000, "the value of --set quantize.bits is not TOML: "),
        ("3\nx=1", r"--set quantize.bits='3\nx=1' sets more than one key"),
        ("3\n[quantize]\nbits=4", r"--set quantize.bits='3\n[quantize]\nbits=4' sets more than one key"),
    ],
)
def test_a_set_that_is_no_single_value_is_refused(tmp_path, value, expected):
    with pytest.raises(RefusedError) as caught:
        load_recipe(write(tmp_path, GOOD), (f"quantize.bits={value}",))
    assert caught.value.what.startswith(expected)
    assert caught.value.fix


@pytest.mark.parametrize("change", ["quantize.bits", "=3", "format.x.y=3", "release.notes=\udcff"])
def test_a_malformed_set_is_refused(tmp_path, change):
    with pytest.raises(RefusedError, match="--set"):
        load_recipe(write(tmp_path, GOOD), (change,))


def test_a_command_line_model_is_not_called_as_the_recipes_own(tmp_path):
    """Its artifact would go to the other's repository, under the other's licence; a copy of a model is that model."""
    folder = tmp_path / "moja kopia"
    folder.mkdir()
    for name in ("gptq", "gguf"):
        other, copied, again = (
            load_recipe(find_recipe(name), model=model)
            for model in (str(folder), "mirror/Bielik-7B-Instruct-v0.1", "speakleash/Bielik-7B-Instruct-v0.1")
        )
        own = load_recipe(find_recipe(name))
        assert (copied.release, again) == (own.release, own)
        told = {key: value for key, value in other.release.model_dump().items() if value is not None}
        assert told == {"languages": ("pl",)}
    assert (other.quantize.name, other.quantize.base_model, other.quantize.license) == ("moja-kopia", None, None)
    assert copied.quantize == own.quantize
    named = load_recipe(find_recipe("gptq"), ("release.repo=a/b", f"model.revision={'0' * 40}"), model="c/d")
    assert (named.release.repo, named.model.revision) == ("a/b", "0" * 40)


def test_a_command_line_model_drops_the_recipes_revision(tmp_path):
    path = write(tmp_path, f'format = "gptq"\n[model]\nid = "a/b"\nrevision = "{"0" * 40}"\n')
    assert load_recipe(path).model.revision == "0" * 40
    assert load_recipe(path, model="c/d").model.revision is None


def test_not_toml_and_empty_and_not_there(tmp_path):
    with pytest.raises(RefusedError, match="the recipe is not TOML"):
        load_recipe(write(tmp_path, "format = \n"))
    with pytest.raises(RefusedError, match="format: required"):
        load_recipe(write(tmp_path, ""))
    for nested in ("[" * 5000, "9" * 5000):
        with pytest.raises(RefusedError, match="the recipe is not TOML"):
            load_recipe(write(tmp_path, f"format = {nested}"))
    for absent in ("none.toml", "a" * 300 + ".toml"):
        with pytest.raises(RefusedError, match="no such recipe file"):
            find_recipe(str(tmp_path / absent))
    with pytest.raises(RefusedError, match="no recipe named"):
        find_recipe("a" * 300)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).format == "gptq"
    pin_recipe(path, "a" * 40)
    assert load_recipe(path).model.revision == "a" * 40
    assert path.read_bytes().startswith(b"\xef\xbb\xbfformat")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("model.id=''",), "model.id: String should have at least 1 character, got ''"),
        (
            (f"model.id='{'a/' * 2049}'",),
            f"model.id: String should have at most 4096 characters, got '{'a/' * 2049}'",
        ),
        *(
            (
                (f"release.repo='{repo}'",),
                f"release.repo: Input should be ORG/NAME as the Hub has it: {REPO_RULES}, got {repo!r}",
            )
            for repo in ("", "foo", "a/b/c", "a b/c", "/a", *NO_REPOSITORIES)
        ),
        (("compute.threads=1025",), "compute.threads: Input should be less than or equal to 1024, got 1025"),
        (
            ("compute.windows_per_batch=99999999999999999999999",),
            "compute.windows_per_batch: Input should be less than or equal to 65536, got 99999999999999999999999",
        ),
        *(
            (
                (f"validation.gates.perplexity_ratio={value}",),
                f"validation.gates.perplexity_ratio: Input should be a finite number, got {value}",
            )
            for value in ("inf", "nan")
        ),
        (("format=exl2", "quantize={bits=[nan]}"), "quantize.bits.0: Input should be a finite number, got nan"),
        (
            ("format=gguf", "quantize={types=['Q4_0','Q4_0']}"),
            "quantize: types are file types, each once",
        ),
        (
            ("format=gguf", "quantize={name='..'}"),
            r"quantize.name: String should match pattern '^[\w+-][\w.+-]*$', got '..'",
        ),
        (("quantize.skip=['']",), "quantize.skip.0: String should have at least 1 character, got ''"),
        (
            ("format=mlx", "quantize={skip=['lm_head','']}"),
            "quantize.skip.1: String should have at least 1 character, got ''",
        ),
        *(
            (
                (f"validation.texts={empty}",),
                "validation.texts: Dictionary should have at least 1 item after validation, not 0, got {}",
            )
            for empty in ("[]", "{}")
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path, changes, expected):
    with pytest.raises(RefusedError) as caught:
        load_recipe(write(tmp_path, GOOD), changes)
    assert caught.value.what == f"1 problem(s) in the recipe:\n  {expected}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 0),
        ({"solver": "gptq"}, 5),
        ({"solver": "gptq", "scale_candidates": 0}, 0),
        ({"solver": "half-quadratic"}, 0),
    ],
)
def test_gptq_on_hqqs_grid_tries_ranges_where_nothing_is_said(given, expected):
    recipe = Recipe.of({"format": "hqq", "model": {"id": "a/b"}, "quantize": given})
    assert recipe.quantize.scale_candidates == expected
    assert recipe.resolved()["quantize"]["scale_candidates"] == expected


def test_values_at_their_limits(tmp_path):
    changes = ("compute.threads=1024", "release.repo=an-org/Zuraw_1.0-x", "quantize.skip=[]")
    assert load_recipe(write(tmp_path, GOOD), changes).compute.threads == 1024


@pytest.mark.parametrize(
    "name", [*NO_REPOSITORIES, "a/b", "_a/b_", "a.git/b", "a-.b/c.d-e", "a/b-", ".a/b", "a/" + "b" * 96, "a/b\n"]
)
def test_repositories_are_those_that_the_hubs_client_takes(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_repository(name)
    else:
        assert is_repository(name)


def test_a_model_id_that_is_too_long_for_a_file_is_none(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), model="a" * 300)
    assert recipe.resolved()["model"]["id"] == "a" * 300
    assert is_on_hub(recipe.model.id)


@pytest.mark.parametrize("name", ["/nope", "./nope", "../nope", "an-org/nope/"])
def test_a_path_is_not_on_the_hub(tmp_path, name):
    recipe = load_recipe(write(tmp_path, GOOD), model=name)
    require_pinned(recipe)
    with pytest.raises(RefusedError, match="is not on the Hub"):
        model_named_in(write(tmp_path, f'[model]\nid = "{name}"\n'))


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(RefusedError, match="did you mean") as caught:
        find_recipe("bielik-nano/gtpq")
    assert "bielik-nano/gptq" in caught.value.fix


def test_resolved_names_hold_no_local_path(tmp_path):
    text = write(tmp_path, "słowa", "words.txt")
    recipe = load_recipe(write(tmp_path, GOOD), (f'calibration.texts={{"{text}"=5}}',), model=str(tmp_path))
    resolved = recipe.resolved()
    assert resolved["model"]["id"] == tmp_path.name
    assert resolved["calibration"]["texts"] == {"words.txt": 5}
    assert str(tmp_path) not in str(resolved)


def test_a_copied_recipe_resolves_to_the_same(tmp_path):
    copy_recipe("bielik-nano/gptq", tmp_path / "own.toml")
    assert load_recipe(tmp_path / "own.toml") == load_recipe(find_recipe("bielik-nano/gptq"))
    with pytest.raises(RefusedError, match="exists"):
        copy_recipe("bielik-nano/gptq", tmp_path / "own.toml")


def test_a_copy_of_a_recipe_of_ones_own_names_the_same_files(tmp_path):
    text = write(tmp_path, "słowa", "words.txt")
    own = GOOD + f'[calibration]\ntexts = {{ "{text}" = 5 }}\n'
    first = write(tmp_path, own.replace('"bielik-nano"', f'"{tmp_path}"'))
    copy_recipe(str(first), tmp_path / "copy.toml")
    assert load_recipe(tmp_path / "copy.toml") == load_recipe(first)
    assert load_recipe(first).calibration.texts == {str(text): 5}


def test_pin_writes_the_revision_and_keeps_comments(tmp_path):
    path = write(tmp_path, "# why\n" + GOOD)
    pin_recipe(path, "a" * 40)
    assert path.read_text().startswith("# why\n")
    assert load_recipe(path).model.revision == "a" * 40


def test_pin_refuses_what_is_no_recipe_file(tmp_path):
    nope = tmp_path / "nope.toml"
    with pytest.raises(RefusedError) as caught:
        model_named_in(nope)
    assert caught.value.what == f"no such recipe file: {nope}"
    with pytest.raises(RefusedError) as caught:
        model_named_in(tmp_path)
    assert str(caught.value).startswith(f"the recipe file cannot be read: Is a directory\n  at:  {tmp_path}\n")
    deep = write(tmp_path, GOOD + f"x = {'[' * 200}{']' * 200}\n")
    with pytest.raises(RefusedError, match="the recipe cannot be edited"):
        pin_recipe(deep, "a" * 40)


def test_one_pin_of_the_base_serves_every_recipe_of_a_model(tmp_path):
    shutil.copytree(shipped("recipes") / "bielik-7b-instruct-v0.1", tmp_path / "model")
    base = tmp_path / "model" / "base.toml"
    recipes = [path for path in (tmp_path / "model").glob("*.toml") if path != base]
    assert len(recipes) == 8
    with pytest.raises(RefusedError, match=r"so it could not be published(.|\n)*recipes pin FILE"):
        require_pinned(load_recipe(recipes[0]))
    assert model_named_in(base) == model_named_in(recipes[0]) == "speakleash/Bielik-7B-Instruct-v0.1"
    pin_recipe(base, "a" * 40)
    for path in recipes:
        require_pinned(load_recipe(path))
    require_pinned(load_recipe(find_recipe("bielik-nano/gptq")))
    with pytest.raises(RefusedError, match="the file names no model"):
        model_named_in(write(tmp_path, 'format = "gptq"\n'))


def test_toml_of_a_resolved_recipe_reads_back():
    recipe = load_recipe(find_recipe("bielik-nano/gptq"))
    assert Recipe.of(recipe.model_dump(mode="json")) == recipe
    assert tomllib.loads(as_toml(recipe.resolved()))["quantize"]["bits"] == 4


def test_only_what_decides_bytes_is_in_the_deciding_part():
    recipe = load_recipe(find_recipe("bielik-nano/gptq"))
    assert recipe.deciding().keys() == {"format", "engine", "model", "quantize", "calibration", "compute"}


@pytest.mark.parametrize(
    ("name", "changes", "good"),
    [
        ("hqq-3bit", ("quantize.bits=4",), False),
        ("hqq-3bit", ("quantize.bits=4", "release.repo=me/Bielik-4bit-HQQ"), True),
        ("hqq-3bit", (), True),
        ("gptq", ("quantize.bits=3",), True),
    ],
)
def test_another_width_than_the_repository_says_is_refused(name, changes, good):
    if good:
        load_recipe(find_recipe(name), changes)
        return
    with pytest.raises(RefusedError) as caught:
        load_recipe(find_recipe(name), changes)
    assert caught.value.what == (
        "1 problem(s) in the recipe:\n  release.repo = 'speakleash/Bielik-7B-Instruct-v0.1-3bit-HQQ' says 3 bits, "
        "quantize.bits = 4; give them a repository of their own with --set release.repo=ORG/NAME"
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ('calibration.texts={"polish-cor"=4}', "no text set 'polish-cor'\n  at:  calibration.texts\n"),
        ('validation.texts=["polish-plus"]', "the text set polish-plus has no validation half\n"),
        ('validation.require=["reference","mlx-ml"]', "no engine named 'mlx-ml'\n  fix: did you mean 'mlx-lm'? "),
        ('validation.require=["mlx-lm"]', "the engine mlx-lm does not read gptq\n  at:  validation.require\n"),
    ],
)
def test_names_that_mean_nothing_are_no_good_recipe(change, error):
    with pytest.raises(RefusedError) as refused:
        check(["gptq"], [change])
    assert str(refused.value).startswith(error)


def test_an_error_of_several_recipes_is_said_once(capsys):
    errors = {"a": RefusedError("x", fix="y"), "b": RunFailedError("z"), "c": RefusedError("x", fix="y")}
    with pytest.raises(typer.Exit) as left:
        fail(errors, several=True)
    assert left.value.exit_code == 2
    assert capsys.readouterr().err == "error: a, c: x\n  fix: y\nerror: b: z\n"
