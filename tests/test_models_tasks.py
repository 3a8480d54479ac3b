import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgepress.compress.errors import TaskError
from edgepress.compress.network import trace
from edgepress.compress.task import score
from edgepress.models import face_detector, mlperf_tiny, sentiment, spoken_digits, trained
from edgepress.models.densenet_cifar import DenseNet
from edgepress.models.examples import Examples
from edgepress.models.face_detector import FaceDetector, Faces, detections
from edgepress.models.mlperf_tiny import AutoEncoder, DepthwiseSeparable, ResNet8, Sounds
from edgepress.models.mobilenet import MobileNetV1
from edgepress.models.published import read_data, read_photos, read_weights
from edgepress.models.sentiment import SentimentNet, read_sentences
from edgepress.models.spoken_digits import SpokenDigitsNet, log_mel
from edgepress.targets.export import export
from edgepress.targets.verify import verify
from edgepress.tasks import BUILT_IN, load_task


def judged(task, **changes):
    """The task's metrics by the network itself, on data changed so."""
    data = replace(task.evaluate.__self__, **changes)
    with torch.inference_mode():
        return data.evaluate(lambda x: task.model(torch.from_numpy(x)).numpy())


# ---- the networks


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (DenseNet(), 1_002_586),
        (MobileNetV1(0.75, 1000), 2_585_560),
        (MobileNetV1(0.25, 2, bias=True, activation=torch.nn.ReLU), 216_322),
        (ResNet8(), 78_186),
        (DepthwiseSeparable(), 23_756),
        (AutoEncoder(), 267_928),
    ],
    ids=lambda value: type(value).__name__,
)
def test_networks_have_the_published_size(model, parameters):
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_smallest_network_becomes_a_file_that_agrees(tmp_path, suffix):
    torch.manual_seed(0)
    network = trace(DepthwiseSeparable().eval(), torch.randn(2, 1, 49, 10))
    assert verify(export(network, tmp_path / f"kws{suffix}"), network).ok


def test_padding_words_change_nothing():
    torch.manual_seed(0)
    model = SentimentNet().eval()
    tokens = torch.randint(1, 100, (3, sentiment.LENGTH))
    tokens[:, 10:] = 0
    with torch.inference_mode():
        before = model(tokens)
        model.words.weight[0] += torch.randn(64)
        torch.testing.assert_close(model(tokens), before)
        model.words.weight[tokens[0, 0]] += torch.randn(64)
        assert not torch.allclose(model(tokens), before, atol=1e-2)


def test_detector_without_offsets_gives_its_anchors():
    model = FaceDetector().eval()
    for header in model.regression_headers.modules():
        if isinstance(header, torch.nn.Conv2d):
            torch.nn.init.zeros_(header.weight)
            torch.nn.init.zeros_(header.bias)
    with torch.inference_mode():
        scores, boxes = model(torch.zeros(1, 3, 240, 320))
    assert torch.allclose(scores.sum(2), torch.ones(1, 4420))
    # the first cell is 8 pixels wide, its first face 10; the last scale has 4 rows of 5 cells with faces of up to 256 pixels
    torch.testing.assert_close(boxes[0, 0] * torch.tensor([320, 240, 320, 240]), torch.tensor([-1.0, -1.0, 9.0, 9.0]))
    torch.testing.assert_close((boxes[0, -1, 2:] + boxes[0, -1, :2]) / 2, torch.tensor([0.9, 0.875]))


# ---- data and judges


def test_no_example_both_calibrates_and_judges():
    data = Examples(torch.arange(10)[:, None], torch.zeros(10).long(), torch.Tensor.float, aside=4)
    aside = torch.cat(list(data.calibration())).flatten().tolist()
    judges = torch.cat([x for x, _ in data.judged()]).flatten().tolist()
    assert aside == [0, 4, 8]
    assert judges == [1, 2, 3, 5, 6, 7, 9]
    assert sorted(torch.cat([x for x, _ in data.training(1)]).flatten().tolist()) == aside
    assert torch.cat([x for x, _ in replace(data, first=3).judged()]).flatten().tolist() == [1, 2, 3]
    assert torch.cat(list(replace(data, first=3).calibration())).flatten().tolist() == aside
    assert len(torch.cat([x for x, _ in replace(data, aside=0).judged()])) == 10


def test_curve_of_broken_machines_is_that_of_their_errors():
    clips = torch.zeros(8, 25600, dtype=torch.float16)
    clips[:, 0] = torch.tensor([0, 4, 1, 5, 2, 6, 9, 3])
    data = Sounds(clips, torch.tensor([False, True] * 4), aside=2)
    assert data.is_aside.tolist() == [True, False, False, False, True, False, False, False]
    assert len(data.windows(clips[0])) == 196
    # sound ones that judge: errors of 1 and 9; broken ones: 4, 5, 6 and 3, each above the 1 and below the 9
    assert data.evaluate(np.zeros_like) == {"auc": 50.0}
    assert data.evaluate(lambda x: x) == {"auc": 50.0}
    assert replace(data, first=4).evaluate(np.zeros_like) == {"auc": 100.0}


def test_overlapping_detections_are_one_face():
    scores = np.zeros((4420, 2), np.float32)
    boxes = np.tile(np.array([0.5, 0.5, 0.6, 0.6], np.float32), (4420, 1))
    scores[:4, 1] = [0.8, 0.9, 0.75, 0.6]
    boxes[:4] = [[0, 0, 0.2, 0.2], [0.01, 0, 0.2, 0.2], [0.7, 0.7, 0.9, 0.9], [0.3, 0.3, 0.4, 0.4]]
    certainty, kept = detections(scores, boxes)
    assert certainty.tolist() == pytest.approx([0.9, 0.75])
    assert np.array_equal(kept, boxes[[1, 2]])


def test_faces_are_judged_by_the_float_network():
    class Two(torch.nn.Module):
        def forward(self, x):
            boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.8, 0.8]]]).repeat(len(x), 1, 1)
            return torch.tensor([[[0.1, 0.9], [0.2, 0.8]]]).repeat(len(x), 1, 1), boxes

    data = Faces(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), Two())

    def moved(x, by, last):
        scores, boxes = (y.numpy().copy() for y in Two()(torch.from_numpy(x)))
        scores[:, 1, 1] = last
        return scores, boxes + np.float32(by)

    assert data.evaluate(lambda x: moved(x, 0.0, 0.8)) == pytest.approx({"f1": 100, "overlap": 100, "score_error": 0}, abs=1e-4)
    # one of two is found (precision 1, recall 1/2), moved by a tenth of its side in both directions: 0.81 / 1.19
    found = data.evaluate(lambda x: moved(x, 0.02, 0.5))
    assert found == pytest.approx({"f1": 200 / 3, "overlap": 100 * 0.81 / 1.19, "score_error": 0}, abs=1e-3)
    assert data.evaluate(lambda x: moved(x, 0.25, 0.8))["f1"] == 0


def test_tones_fall_into_higher_bands_the_higher_they_are():
    time = np.arange(4000) / 8000
    bands = [
        int(log_mel((9000 * np.sin(2 * np.pi * f * time)).astype(np.int16))[3].argmax()) for f in (200, 500, 1000, 2000, 3500)
    ]
    assert bands == sorted(set(bands))
    quiet, loud = (log_mel((volume * np.sin(2 * np.pi * 500 * time)).astype(np.int16)) for volume in (3000, 30000))
    assert np.allclose(quiet, loud, atol=0.05)
    assert not log_mel(np.zeros(100, np.int16)).any()


def test_sentences_are_cut_and_rare_words_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_DATA", str(tmp_path))
    monkeypatch.setattr(sentiment, "WORDS", 4)
    lines = ["dataset\tsplit\tlabel\ttext", "mr\tall\t1\tb b b b", f"sst2\ttrain\t1\t{'a ' * 40}", "sst2\ttrain\t0\tb b c"]
    lines += ["sst2\tdev\t1\tc a", "sst2\ttest\t0\tb"]
    with gzip.open(tmp_path / "text_cls.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    parts = read_sentences()
    assert parts["train"][0][0].tolist() == [2] * 32
    assert parts["train"][0][1, :4].tolist() == [3, 3, 1, 0]
    assert parts["train"][1].tolist() == [1, 0]
    assert parts["dev"][0][0, :3].tolist() == [1, 2, 0]
    (tmp_path / "text_cls.tsv.gz").write_bytes(b"nothing")
    with pytest.raises(TaskError, match="is damaged"):
        read_sentences()


def test_photos_are_unpacked_and_resized():
    image = pytest.importorskip("PIL.Image")
    blobs = []
    for colour in ((250, 10, 10), (10, 10, 250)):
        file = io.BytesIO()
        image.new("RGB", (12, 8), colour).save(file, "JPEG")
        blobs.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, blobs)])
    pack = {"jpeg": np.frombuffer(b"".join(blobs), np.uint8), "offsets": offsets}
    photos = read_photos(pack, (4, 6))
    assert photos.shape == (2, 3, 4, 6)
    assert np.abs(photos[:, :, 0, 0].astype(int) - [[250, 10, 10], [10, 10, 250]]).max() <= 3
    with pytest.raises(TaskError, match="Photo 1 of the reference data is damaged"):
        read_photos({**pack, "offsets": offsets - np.array([0, 0, 300])}, (4, 6))


def test_missing_and_damaged_files_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"net\.safetensors are missing: they come from https://source"):
        read_weights("net", "https://source")
    with pytest.raises(TaskError, match=r"set\.npz are missing: they come from https://source"):
        read_data("set", "https://source")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.safetensors").write_bytes(b"nothing")
    (tmp_path / "set.npz").write_bytes(b"nothing")
    with pytest.raises(TaskError, match=r"net\.safetensors is damaged"):
        read_weights("net", "https://source")
    with pytest.raises(TaskError, match=r"set\.npz is damaged"):
        read_data("set", "https://source")
    save_file({"x": torch.ones(2)}, tmp_path / "weights" / "net.safetensors")
    assert read_weights("net", "")["x"].tolist() == [1, 1]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "digits"])
def test_every_reference_task_says_what_it_needs(name, monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEPRESS_DATA", raising=False)
    with pytest.raises(TaskError, match="EDGEPRESS_DATA names, and the variable is not set"):
        load_task(name)
    monkeypatch.setenv("EDGEPRESS_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"missing.*https://"):
        load_task(name)


# ---- networks that are trained on the spot


def signs(epoch):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(epoch))
    return iter([(x, (x[:, 0] > 0).long())] * 4)


def linear():
    return torch.nn.Linear(2, 2)


def test_training_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    first = trained.trained("signs", linear, signs, 25, 0.1)
    x, y = next(signs(99))
    assert (first(x).argmax(1) == y).float().mean() > 0.9
    (kept,) = (tmp_path / "models").iterdir()
    monkeypatch.setattr(trained, "_train", lambda *_: pytest.fail("trained again"))
    assert torch.equal(trained.trained("signs", linear, signs, 25, 0.1).weight, first.weight)
    monkeypatch.undo()
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    kept.write_bytes(b"nothing")
    assert torch.equal(trained.trained("signs", linear, signs, 25, 0.1).weight, first.weight)
    assert not torch.equal(trained.trained("signs", linear, signs, 6, 0.1).weight, first.weight)
    assert len(list((tmp_path / "models").iterdir())) == 2


def test_training_needs_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "file"))
    state = torch.get_rng_state()
    assert not trained.trained("signs", linear, signs, 1, 0.1).training
    assert torch.equal(torch.get_rng_state(), state)


# ---- as they were published


def test_mlperf_tiny_networks_reproduce_their_accuracy(reference_data):
    keywords, people, machines = mlperf_tiny.mlperf_kws(), mlperf_tiny.mlperf_vww(), mlperf_tiny.mlperf_ad()
    assert judged(keywords, aside=0)["accuracy"] == pytest.approx(91.3)
    assert judged(people, aside=0)["accuracy"] == pytest.approx(84.4)
    assert judged(machines, aside=0)["auc"] == pytest.approx(83.0, abs=0.1)
    assert len(torch.cat(list(keywords.calibration_batches()))) == 500
    assert set(judged(machines, first=10)) == {"auc"}


def test_face_detector_finds_what_it_is_published_to_find(reference_data):
    pytest.importorskip("PIL")
    task = face_detector.face_detector()
    photos = task.evaluate.__self__.photos
    with torch.inference_mode():
        found = [task.model(Faces.prepare(photo)) for photo in photos.split(1)]
        assert sum(len(detections(s[0].numpy(), b[0].numpy())[0]) for s, b in found) == 679
        assert score(task, lambda x: tuple(y.numpy() for y in task.model(torch.from_numpy(x)))) == pytest.approx(100)


def test_spoken_digits_train_and_test_on_different_clips(reference_data, monkeypatch):
    monkeypatch.setattr(spoken_digits, "trained", lambda *_: SpokenDigitsNet().eval())
    task = spoken_digits.spoken_digits(examples=50)
    seen = []

    def counted(x):
        seen.append(x)
        return np.zeros((len(x), 10))

    assert 0 <= task.evaluate(counted)["accuracy"] <= 100
    assert 5 <= task.validate(counted)["accuracy"] <= 15
    assert [len(x) for x in seen] == [50, 300]
    assert sum(len(y) for _, y in task.train_batches(0)) == 2400
