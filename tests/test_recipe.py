from pathlib import Path

import pytest
import yaml

import edgepress as ep
from edgepress.compress.errors import FileError, RecipeError
from edgepress.recipe import Recipe, default_recipe, read_recipe


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_recipe_is_read_as_the_passes_it_names(tmp_path):
    recipe = read(
        tmp_path,
        """
        passes:
          - shorten: {macs: 0.7}
          - prune: {macs: 0.5, criterion: {magnitude: {p: 1}}, rounds: 2}
          - distill: {epochs: 3, lr: 0.1, minutes: 2}
          - prune
          - prune: {latency: 0.25 ms, bytes: 0.5, depth: true, criterion: fisher, limits: {"layer1.*": 1.0}, recover: {epochs: 2}}
        export: {formats: onnx, precisions: [int8]}
        """,
    )
    assert recipe.passes == (
        ep.Shorten(macs=0.7),
        ep.Prune(macs=0.5, criterion=ep.Magnitude(p=1), rounds=2),
        ep.Distill(epochs=3.0, lr=0.1, minutes=2.0),
        ep.Prune(),
        ep.Prune(
            latency="0.25 ms",
            bytes=0.5,
            depth=True,
            criterion=ep.Fisher(),
            limits={"layer1.*": 1.0},
            recover=ep.Distill(epochs=2.0),
        ),
    )
    assert (recipe.formats, recipe.precisions) == (("onnx",), ("int8",))


def test_recipe_may_be_a_bare_list_of_passes(tmp_path):
    assert read(tmp_path, "[distill]") == Recipe((ep.Distill(),))


@pytest.mark.parametrize(
    "recipe",
    [
        default_recipe(),
        Recipe((ep.Prune(macs="40 M", limits={"fc*": 8.0}, recover=ep.Distill(epochs=1.0, minutes=3.0)),)),
        Recipe((ep.Shorten(macs=0.4, parameters=0.5), ep.Prune(criterion=ep.Random(seed=3)), ep.Distill(epochs=2)), ("tflite",)),
    ],
)
def test_recipe_reads_back_what_it_writes(tmp_path, recipe):
    assert read(tmp_path, recipe.yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes: [{prun: {}}]", "'prun' is no known pass; did you mean 'prune'?"),
        ("passes: [{prune: {mac: 0.5}}]", "'mac' is no known setting of prune; did you mean 'macs'?"),
        ("pases: []", "'pases' is no known key; did you mean 'passes'?"),
        ("passes: [{prune: {criterion: tailor}}]", "'tailor' is no known criterion; did you mean 'taylor'?"),
        ("passes: [{prune: {criterion: {taylor: {square: true}}}}]", "did you mean 'squared'?"),
        ("passes: [{prune: {macs: half}}]", "Prune(macs='half') makes no sense: write a part such as 0.5, or an amount"),
        ("passes: [{prune: {latency: 3 kg}}]", "(units: s, ms, us"),
        ("passes: [{prune: {rounds: [1]}}]", "prune.rounds is [1]; it must be int"),
        ("passes: [{distill: {epochs: true}}]", "distill.epochs is True"),
        ("passes: [{distill: {optimizer: adam}}]", "'adam' is no known value of distill.optimizer; did you mean 'adamw'?"),
        ("passes: [{distill: {teacher: me.onnx}}]", "there is no teacher me.onnx: paths count from the folder where"),
        ("passes: [{quantize: {teacher: [3]}}]", "a teacher is the path of a file, or a list of them, not [3]"),
        ("passes: [{distill: {checkpoint: me}}]", "'checkpoint' is no known setting of distill"),
        ("passes: [{prune: {macs: 2}}]", "Prune(macs=2.0) makes no sense"),
        ("export: {formats: [onx]}", "'onx' is no known format; did you mean 'onnx'?"),
        ("export: {precisions: []}", "names no precision"),
        ("passes: prune", "passes is a list"),
        ("3", "a recipe is a list of passes"),
        ("passes: [3]", "a pass is written as"),
        ("a: [", "is not YAML"),
    ],
)
def test_recipe_refuses_what_it_does_not_know(tmp_path, text, said):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize("teacher", ["one.onnx", ["one.onnx", "two.pt2"]])
def test_recipe_names_teachers(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(tmp_path)
    for name in ("one.onnx", "two.pt2"):
        Path(name).touch()
    for name in ("distill", "quantize"):
        recipe = read(tmp_path, yaml.safe_dump({"passes": [{name: {"teacher": teacher}}]}))
        assert recipe.passes[0].teacher == teacher
        assert read(tmp_path, recipe.yaml()) == recipe


def test_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileError, match=r"Cannot read the recipe .*nothing\.yaml"):
        read_recipe(tmp_path / "nothing.yaml")
