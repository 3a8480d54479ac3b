from dataclasses import replace

import pytest
import torch
from nets import build
from torch import nn

from edgepress.compress import losses
from edgepress.compress.distill import Distill
from edgepress.compress.errors import RecipeError
from edgepress.compress.features import matched, places, projections, watched
from edgepress.compress.network import Network, trace
from edgepress.compress.pruning import Magnitude, Prune
from edgepress.compress.shorten import Shorten
from edgepress.compress.task import Task, score
from edgepress.compress.train import Precision
from edgepress.models.resnet_cifar import CifarResNet

PLAIN = Precision()
KINDS = ["hints", "attention", "similarity", "relational"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    return trace(CifarResNet(8), torch.zeros(1, 3, 32, 32)), trace(CifarResNet(14), torch.zeros(1, 3, 32, 32))


def narrowed(task, part=0.3):
    return Prune(Magnitude(), macs=part, rounds=1, multiple=1)(trace(task.model, task.inputs), task)


def weights(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- matching by name


def test_stages_of_two_depths_are_matched_by_name(resnets):
    student, teacher = resnets
    pairs = matched(student, teacher)
    assert [mine.module for mine, _ in pairs] == ["layer1", "layer2", "layer3"]
    assert [mine.shape for mine, _ in pairs] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert all(mine.node != theirs.node for mine, theirs in pairs)  # the graph nodes are called differently


def test_pruned_and_shortened_networks_keep_their_modules_names(resnets, tmp_path):
    teacher = resnets[1]
    x = torch.randn(4, 3, 32, 32)
    task = Task(CifarResNet(14), x, lambda predict: {"a": 0.0}, "a", train_batches=[(x, torch.zeros(4).long())])
    smaller = Prune(Magnitude(), macs=0.5, rounds=1)(Shorten(macs=0.9)(teacher, task), task)
    smaller.save(tmp_path / "saved")
    for network in (smaller, Network.load(tmp_path / "saved")):
        pairs = matched(network, teacher)
        assert [mine.module for mine, _ in pairs] == ["layer1", "layer2", "layer3"]
        assert any(mine.width < theirs.width for mine, theirs in pairs)


def test_layers_of_a_transformer_are_matched():
    model, inputs = build("transformer")
    network = trace(model, inputs(2))
    pairs = matched(network, network)
    assert [p.module for p, _ in pairs] == ["encoder.layers.0", "encoder.layers.1"]
    assert [p.axis for p, _ in pairs] == [2, 2]


@pytest.mark.parametrize("name", ["mobilenet", "densenet", "unet", "lstm", "rotary"])
def test_something_is_found_to_compare_in_every_family(name):
    model, inputs = build(name)
    network = trace(model, inputs(2))
    pairs = matched(network, network)
    assert pairs
    with watched(network, [p for p, _ in pairs]) as seen, torch.no_grad():
        network(*inputs(3))
        for place, _ in pairs:
            assert tuple(seen[place.module].shape) == (3, *place.shape)


def test_layers_can_be_named(resnets):
    student, teacher = resnets
    ((mine, theirs),) = matched(student, teacher, "layer2.0=layer2.1")
    assert (mine.module, theirs.module) == ("layer2.0", "layer2.1")
    with pytest.raises(RecipeError, match=r"The student has no module 'layer9'.*'layer1'"):
        matched(student, teacher, "layer9")
    with pytest.raises(RecipeError, match=r"'layer1' gives .*32, 32.* and 'layer2' .*16, 16.*all but the channels"):
        matched(student, teacher, "layer1=layer2")
    assert matched(student, teacher, "layer1=layer2", same_positions=False)


def test_networks_with_nothing_in_common_are_told_what_they_have(resnets):
    other = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.zeros(1, 3, 8, 8))
    with pytest.raises(RecipeError, match=r"no module of the same name.*mine=theirs.*The student has '0'.*the teacher has"):
        matched(other, resnets[0])


def test_module_called_twice_has_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.c(self.c(x).relu()).mean((2, 3)))

    assert list(places(trace(Twice(), torch.zeros(1, 3, 4, 4)))) == ["c", "c@1", "head"]


def test_watching_must_leave_the_graph_as_it_was(resnets):
    network = resnets[0].copy()
    before = str(network.module.graph)
    place = places(network)["layer1"]
    with watched(network, [place]) as seen:
        network(torch.randn(2, 3, 32, 32)).sum().backward()
        assert seen["layer1"].shape == (2, 16, 32, 32)
        assert seen["layer1"].grad_fn is not None
    assert str(network.module.graph) == before
    assert not seen


# ---- training


@pytest.mark.parametrize("features", KINDS)
def test_features_of_a_narrower_student_come_closer(task, features):
    student = narrowed(task)
    distill = Distill(epochs=3, lr=0.05, labels=0.0, features=features, feature_weight=10.0 if features == "hints" else None)
    recovered = replace(distill, precision=PLAIN)(student, task)
    found = recovered.history[-1]["found"]
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert found["features"] == ["block"]
    assert recovered.history[-1]["features"] == features
    assert score(task, recovered.predict) > score(task, student.predict)


def test_projections_are_trained_and_must_not_be_in_the_student(task, monkeypatch):
    import edgepress.compress.distill as module

    made = {}

    def noting(*arguments):
        made.update(projections(*arguments))
        made.update({f"{name} before": p.detach().clone() for name, p in made.items()})
        return {name: p for name, p in made.items() if not name.endswith("before")}

    monkeypatch.setattr(module, "projections", noting)
    student = narrowed(task)
    width = places(student)["block"].width
    recovered = Distill(epochs=1, features="hints", precision=PLAIN)(student, task)
    assert tuple(made["block"].shape) == (16, width)
    assert width < 16
    assert not torch.equal(made["block"], made["block before"])
    assert weights(recovered).keys() == weights(student).keys()
    assert recovered.parameter_count == student.parameter_count
    assert str(recovered.module.graph) == str(student.module.graph)


def test_features_weigh_nothing_with_weight_zero(task):
    student = narrowed(task)
    settings = {"epochs": 1, "precision": PLAIN, "cache": False}
    plain = Distill(**settings)(student, task)
    weighed = Distill(features="attention", feature_weight=0.0, **settings)(student, task)
    assert same(weights(plain), weights(weighed))


def test_interrupted_feature_distillation_ends_at_the_same_weights(task, tmp_path):
    student = narrowed(task)
    distill = Distill(epochs=2, features="hints", precision=PLAIN, checkpoint=tmp_path / "run.checkpoint")
    whole = distill(student, task)
    distill.checkpoint.unlink()

    def stop(epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return task.train_batches(epoch)

    with pytest.raises(KeyboardInterrupt):
        distill(student, replace(task, train_batches=stop))
    assert distill.checkpoint.exists()
    assert same(weights(whole), weights(distill(student, task)))


@pytest.mark.parametrize("loss", ["logits", "decoupled", "tokens", "outputs"])
def test_losses_bring_the_accuracy_back_without_labels(task, loss):
    """From the calibration stream alone."""
    student = narrowed(task, 0.25)
    unlabelled = replace(task, train_batches=None)
    recovered = Distill(epochs=6, lr=0.05, loss=loss, precision=PLAIN)(student, unlabelled)
    entry = recovered.history[-1]
    assert entry["found"]["labelled"] is False
    assert entry["found"]["steps"] == 24
    assert entry["loss"] == loss
    assert score(task, recovered.predict) > max(90.0, score(task, student.predict))


def test_labels_are_reported(task):
    student = narrowed(task)
    for labels, expected in ((0.1, True), (0.0, False)):
        entry = Distill(epochs=0.25, labels=labels, precision=PLAIN)(student, task).history[-1]
        assert entry["found"]["labelled"] is expected


def test_labels_alone_never_ask_the_teacher(task):
    class Asked(nn.Module):
        count = 0

        def forward(self, x):
            Asked.count += 1
            return torch.zeros(len(x), 3)

    Distill(epochs=0.5, labels=1.0, teacher=Asked(), precision=PLAIN)(narrowed(task), task)
    assert Asked.count == 1  # to see whether it fits


def test_decoupled_target_is_the_label_where_there_is_one(task, monkeypatch):
    import edgepress.compress.distill as module

    seen = []
    plain = losses.decoupled_distillation
    monkeypatch.setattr(
        module, "decoupled_distillation", lambda a, b, classes, *rest: seen.append(classes) or plain(a, b, classes, *rest)
    )
    images, labels = task.train_batches(0)[0]
    wrong = (labels + 1) % 3
    student = narrowed(task)
    seen.clear()
    for targets in (wrong, None, nn.functional.one_hot(wrong, 3).float()):  # soft targets, of mixup say, name no class
        Distill(epochs=1, loss="decoupled", precision=PLAIN)(student, replace(task, train_batches=[(images, targets)]))
    told = trace(task.model, task.inputs)(images).argmax(1)
    assert torch.equal(seen[1], wrong)  # the first of each pair is the look at the outputs before training
    assert torch.equal(seen[3], told)
    assert torch.equal(seen[5], told)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 4)

    def forward(self, tokens, attention_mask):
        return self.head(self.embedding(tokens) * attention_mask[..., None].float())


def test_padding_is_left_out_by_the_mask_or_by_the_targets(monkeypatch):
    import edgepress.compress.distill as module

    masks = []
    plain = losses.token_distillation
    monkeypatch.setattr(module, "token_distillation", lambda a, b, mask, t: masks.append(mask) or plain(a, b, mask, t))
    tokens, mask = torch.randint(0, 5, (4, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]]).repeat(4, 1)
    targets = torch.where(mask == 1, torch.randint(0, 4, (4, 6)), -100)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())

    task = Task(Tagger(), (tokens, mask), lambda predict: {"a": 0.0}, "a", train_batches=[((tokens, mask), targets)], loss=loss)
    Distill(epochs=1, loss="tokens", precision=PLAIN)(trace(task.model, task.inputs), task)
    assert torch.equal(masks[-1], mask)

    class Plain(Tagger):
        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    task = Task(Plain(), tokens, lambda predict: {"a": 0.0}, "a", train_batches=[(tokens, targets)], loss=loss)
    Distill(epochs=1, loss="tokens", precision=PLAIN)(trace(task.model, task.inputs), task)
    assert torch.equal(masks[-1], targets != -100)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.boxes, self.scores = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        y = self.body(x).relu()
        boxes, scores = (
            f(y).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (2, -1)).flatten(1, 2) for f in (self.boxes, self.scores)
        )
        return {"scores": scores, "boxes": boxes}


@pytest.mark.parametrize("named", [{}, {"boxes": "boxes", "scores": "scores", "background": 0}])
def test_detector_follows_its_teacher(named):
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    task = Task(
        Detector(), images, lambda predict: {"a": 0.0}, "a", calibration_batches=[images] * 15, loss=lambda y, t: y["boxes"].sum()
    )
    other = Detector()
    distill = Distill(epochs=4, lr=0.1, loss="detection", temperature=1.0, precision=PLAIN, **named)
    recovered = distill(trace(other, images), task)
    found = recovered.history[-1]["found"]
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    with pytest.raises(RecipeError, match=r"which output holds the boxes.*scores, boxes"):
        replace(distill, boxes="box")(trace(other, images), task)
    with pytest.raises(RecipeError, match="background=7"):
        replace(distill, background=7)(trace(other, images), task)


@pytest.mark.parametrize(
    "wrong", [{"features": "hint"}, {"loss": "kd"}, {"beta": -1.0}, {"feature_weight": -1.0}, {"temperature": 0}, {"labels": 2.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError):
        Distill(**wrong)


def test_the_choice_is_written_in_recipes(tmp_path):
    from edgepress.recipe import Recipe, read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "passes:\n- distill: {loss: decoupled, beta: 2, features: hints, layers: layer3, feature_weight: 2, cache: false}\n"
    )
    (chosen,) = read_recipe(path).passes
    assert chosen == Distill(loss="decoupled", beta=2.0, features="hints", layers="layer3", feature_weight=2.0, cache=False)
    path.write_text(Recipe((chosen,)).yaml())
    assert read_recipe(path).passes == (chosen,)
    path.write_text("passes:\n- distill: {loss: decoupledd}\n")
    with pytest.raises(RecipeError, match="did you mean 'decoupled'"):
        read_recipe(path)
