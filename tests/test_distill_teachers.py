import io
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from edgepress.compress import teacher_cache
from edgepress.compress.distill import Distill
from edgepress.compress.errors import FileError, RecipeError
from edgepress.compress.network import trace
from edgepress.compress.programs import check_program
from edgepress.compress.task import Task
from edgepress.compress.teacher import check_teacher, fingerprint, open_teacher
from edgepress.compress.teacher_cache import Remembered, example_keys, outputs_folder
from edgepress.compress.train import Precision

PLAIN = Precision()
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))


def mlp(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes)).eval()


def small_task(model, **settings):
    settings = {"calibration_batches": [X], **settings}
    return Task(model, X[:2], lambda predict: {"a": 0.0}, "a", **settings)


def exported(model, path=None, open_batch=True):
    shapes = ({0: torch.export.Dim("batch", min=1)},) if open_batch else None
    program = torch.export.export(model, (X,), dynamic_shapes=shapes)
    if path is not None:
        torch.export.save(program, path)
    return program


def saved_onnx(model, path, open_batch=True):
    from edgepress.targets.export import export

    export(trace(model, X), path, "fp32")
    if not open_batch:
        import onnx

        file = onnx.load(path)
        for value in (*file.graph.input, *file.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(file, path)
    return path


def source(kind, model, folder):
    if kind == "torchscript":
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.trace(model, X).save(folder / "teacher.pt")
        return folder / "teacher.pt"
    if kind == "onnx":
        return saved_onnx(model, folder / "teacher.onnx")
    if kind == "pt2":
        exported(model, folder / "teacher.pt2")
        return str(folder / "teacher.pt2")
    if kind == "saved":
        return trace(model, X).save(folder / "teacher")
    return {"network": lambda: trace(model, X), "module": lambda: model, "program": lambda: exported(model)}[kind]()


@pytest.mark.parametrize("kind", ["network", "module", "program", "pt2", "saved", "onnx", "torchscript"])
def test_every_kind_of_teacher_gives_the_models_outputs(kind, tmp_path):
    model = mlp()
    teacher = open_teacher(source(kind, model, tmp_path), "cpu")
    for count in (6, 5):  # any batch
        with torch.inference_mode():
            assert torch.allclose(teacher((X[:count],)), model(X[:count]), atol=1e-6)


def test_module_in_training_mode_teaches_in_evaluation_mode_and_stays_as_it_was():
    model = mlp().train()
    mean = model[1].running_mean.clone()
    with torch.inference_mode():
        assert torch.equal(open_teacher(model, "cpu")((X,)), mlp()(X))
    assert model.training
    assert torch.equal(model[1].running_mean, mean)


def test_ensemble_gives_the_mean_of_logits(tmp_path):
    one, two = mlp(1), mlp(2)
    teacher = open_teacher([one, source("onnx", two, tmp_path)], "cpu")
    with torch.inference_mode():
        assert torch.allclose(teacher((X,)), (one(X) + two(X)) / 2, atol=1e-6)
        with pytest.raises(RecipeError, match=r"different shapes: \[\[\[6, 3\]\], \[\[6, 5\]\]\]"):
            open_teacher([one, mlp(classes=5)], "cpu")((X,))


def test_onnx_file_of_a_fixed_batch_is_asked_in_pieces(tmp_path):
    model = mlp()
    teacher = open_teacher(saved_onnx(model, tmp_path / "two.onnx", open_batch=False), "cpu")
    with torch.inference_mode():
        assert torch.allclose(teacher((X,)), model(X), atol=1e-6)
    with pytest.raises(RecipeError, match="takes batches of 2, not of 5"):
        teacher((X[:5],))


def test_teachers_that_are_none_are_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no")
    (tmp_path / "bad.pt2").write_bytes(b"no")
    torch.save(mlp().state_dict(), tmp_path / "weights.pt")
    for made, kind, words in (
        (tmp_path / "missing.onnx", FileError, "There is no teacher"),
        (tmp_path / "bad.onnx", FileError, "ONNX Runtime cannot load the teacher"),
        (tmp_path / "bad.pt2", FileError, "no program of torch.export.save"),
        (tmp_path / "weights.pt", FileError, "pass the module that they belong to"),
        (exported(mlp(), open_batch=False), RecipeError, "batches of 6 alone"),
        ([], RecipeError, "the list is empty"),
        (3, RecipeError, "A teacher cannot be a int"),
    ):
        with pytest.raises(kind, match=words) as raised:
            open_teacher(made, "cpu")
        assert "\n" not in str(raised.value)


def test_teacher_that_does_not_fit_is_refused_before_training(monkeypatch):
    student = mlp()
    task = small_task(student)
    network = trace(student, X)
    monkeypatch.setattr("edgepress.compress.distill.fit", lambda *a, **k: pytest.fail("training began"))
    with pytest.raises(RecipeError, match=r"The teacher gives \[6, 5\] where the student gives \[6, 3\]"):
        Distill(teacher=mlp(classes=5), precision=PLAIN)(network, task)
    with pytest.raises(RecipeError, match=r"does not run on the student's inputs \[6, 4\]: mat1 and mat2"):
        Distill(teacher=nn.Linear(7, 3), precision=PLAIN)(network, task)
    with pytest.raises(RecipeError, match="looks inside the teacher"):
        Distill(teacher=[mlp(1), mlp(2)], features="relational", precision=PLAIN)(network, task)
    with pytest.raises(RecipeError, match="two classes"):
        Distill(teacher=mlp(classes=1), loss="decoupled", precision=PLAIN)(trace(mlp(classes=1), X), small_task(mlp(classes=1)))


@pytest.mark.parametrize("kind", ["onnx", "pt2", "module"])
def test_student_follows_a_file(kind, tmp_path):
    wise = mlp(7)
    task = small_task(mlp(), calibration_batches=[X] * 10)
    distill = Distill(epochs=4, lr=0.05, teacher=source(kind, wise, tmp_path), precision=PLAIN)
    found = distill(trace(task.model, X), task).history[-1]
    assert found["found"]["losses"][-1] < 0.5 * found["found"]["losses"][0]
    assert ("teacher" in found) == (kind != "module")


@pytest.mark.parametrize("kind", ["pt2", "module"])
def test_programs_and_modules_show_their_inner_tensors(kind, tmp_path):
    task = small_task(mlp())
    teacher = source(kind, mlp(7), tmp_path)
    distill = Distill(epochs=1, teacher=teacher, features="relational", layers="0, 2", precision=PLAIN)
    assert distill(trace(task.model, X), task).history[-1]["found"]["features"] == ["0", "2"]


# ---- files that would run code


def rewritten(path, entry, change):
    """The archive with one entry changed, or one more."""
    content = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            content[info.filename] = archive.read(info)
    root = next(iter(content)).split("/")[0]
    content[f"{root}/{entry}"] = change(content.get(f"{root}/{entry}", b""))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def pickled():
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("entry", "change", "words"),
    [
        ("models/model.json", lambda d: d.replace(b"torch.ops.aten.relu.default", b"torch.os.system"), "calls 'torch.os.system'"),
        ("models/model.json", lambda d: d.replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.save.default"), "calls"),
        ("models/model.json", lambda d: d.replace(b"integer=True", b"integer=exit()"), "no plain expression"),
        ("data/weights/model_weights_config.json", lambda d: d.replace(b"false", b"true"), "is a pickle"),
        ("data/sample_inputs/model.pt", lambda d: pickled(), "sample inputs are a pickle"),
        ("data/aotinductor/model.so", lambda d: b"", "holds the entry"),
    ],
)
def test_program_that_would_run_code_is_not_loaded(tmp_path, monkeypatch, entry, change, words):
    path = tmp_path / "teacher.pt2"
    exported(mlp(), path)
    check_program(path)
    rewritten(path, entry, change)
    monkeypatch.setattr(torch.export, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(FileError, match=words):
        open_teacher(path, "cpu")


def test_program_check_knows_what_edgepress_writes(tmp_path):
    from edgepress.targets.export import export

    export(trace(mlp(), X), tmp_path / "net.pt2", "fp32")
    trace(mlp(), X).save(tmp_path / "saved")
    check_program(tmp_path / "net.pt2")
    check_program(tmp_path / "saved" / "program.pt2")


def test_program_check_agrees_with_the_agents():
    """Two copies of the rules, because the agent imports nothing of ours: they must not drift apart."""
    from edgepress.compress import programs
    from edgepress.targets.agent import pt2

    assert programs._ENTRY.pattern == pt2._ENTRY.pattern
    assert programs._OPERATOR.pattern == pt2._TARGET.pattern
    assert programs._WORDS == pt2._WORDS
    assert programs._NESTS == pt2._SPECS


@pytest.mark.parametrize(
    ("size", "plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("FloorDiv(Add(Mul(Integer(2), Symbol('s31')), Integer(1)), 3)", True),
        ("s77*4 + 2", True),
        ("Float('0.5')", True),
        ("__import__('os').system('id')", False),
        ("Symbol('s').__class__", False),
        ("exit()", False),
        ("1" * 5000 + "!", False),  # and at once
    ],
)
def test_sizes_must_be_plain(size, plain):
    from edgepress.compress.programs import _plain

    assert _plain(size) is plain


# ---- remembered outputs


class Counting:
    def __init__(self, answer=lambda x: x * 2):
        self.batches, self._answer = 0, answer

    def __call__(self, inputs):
        self.batches += 1
        return self._answer(inputs[0])


def remembered(teacher, inputs, epoch=3, name="name", answer=None):
    return Remembered(teacher, inputs, answer if answer is not None else inputs[0] * 2, name, outputs_folder(), epoch)


def test_data_that_come_again_ask_the_teacher_once_in_whatever_order():
    data = torch.arange(24.0).view(12, 2)
    teacher = Counting()
    memory = remembered(teacher, (data[:4],))
    for epoch in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(4):
            assert torch.equal(memory((data[rows],)), data[rows] * 2)
    assert teacher.batches == 3
    assert memory.close() == {"asked": 3, "found": 6}


def test_another_run_finds_what_was_kept_and_another_teacher_does_not():
    data = torch.arange(24.0).view(12, 2)
    for name, asked in (("one", 3), ("one", 0), ("two", 3)):
        teacher = Counting()
        memory = remembered(teacher, (data[:4],), name=name)
        for _ in range(2):
            for rows in data.split(4):
                assert torch.equal(memory((rows,)), rows * 2)
        memory.close()
        assert teacher.batches == asked
    assert len(list(outputs_folder().iterdir())) == 2


def test_data_that_never_come_again_leave_nothing():
    teacher = Counting()
    memory = remembered(teacher, (torch.zeros(4, 2),))
    for i in range(30):
        memory((torch.full((4, 2), float(i)) + torch.rand(4, 2),))
    assert not list(outputs_folder().iterdir())  # given up in the second epoch, not at the end
    memory.close()
    assert teacher.batches == 30


def test_teacher_without_a_fingerprint_is_remembered_for_one_run_only():
    teacher = Counting()
    data = torch.rand(4, 2)
    memory = remembered(teacher, (data,), name="")
    memory((data,))
    memory((data,))
    assert teacher.batches == 1
    memory.close()
    assert not list(outputs_folder().iterdir())
    assert fingerprint(mlp()) == ""
    assert fingerprint(trace(mlp(), X)) == fingerprint(trace(mlp(), X)) != fingerprint(trace(mlp(1), X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_outputs_of_any_type_and_nesting_come_back(dtype):
    data = torch.rand(4, 3, 2)
    answer = lambda x: {"a": (x * 10).to(dtype), "b": (x[:, 0, 0], x)}  # noqa: E731
    memory = remembered(Counting(answer), (data,), answer=answer(data))
    first = memory((data,))
    again = memory((data.flip(0),))
    assert memory.close() == {"asked": 1, "found": 1}
    assert torch.equal(again["a"], first["a"].flip(0))
    assert again["a"].dtype == dtype
    assert torch.equal(again["b"][0], data[:, 0, 0].flip(0))
    assert torch.equal(again["b"][1], data.flip(0))


def test_same_example_twice_in_a_batch_is_one():
    data = torch.tensor([[1.0], [1.0], [2.0], [1.0]])
    memory = remembered(Counting(), (data,))
    memory((data,))
    assert torch.equal(memory((torch.tensor([[2.0], [1.0]]),)), torch.tensor([[4.0], [2.0]]))
    assert memory.close() == {"asked": 1, "found": 1}


def test_disk_is_bounded_and_a_full_one_stops_nothing(monkeypatch):
    monkeypatch.setattr(teacher_cache, "LIMIT_BYTES", 100)  # of records of 16 + 8 bytes: four
    data = torch.arange(24.0).view(12, 2)
    teacher = Counting()
    memory = remembered(teacher, (data[:4],))
    for _ in range(2):
        for rows in data.split(4):
            assert torch.equal(memory((rows,)), rows * 2)
    memory.close()
    assert sum(p.stat().st_size for p in outputs_folder().iterdir()) <= 100

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_cache.tempfile, "mkstemp", full)
    memory = remembered(Counting(), (data[4:8],))
    for _ in range(2):
        assert torch.equal(memory((data[4:8],)), data[4:8] * 2)


def test_all_files_together_are_bounded(monkeypatch):
    monkeypatch.setattr(teacher_cache, "LIMIT_BYTES", 250)
    for i in range(4):
        data = torch.rand(4, 2) + i
        memory = remembered(Counting(), (data,))
        memory((data,))
        memory((data,))
        memory.close()
    assert sum(p.stat().st_size for p in outputs_folder().iterdir()) <= 250


def test_interrupted_writing_leaves_no_file_that_is_read():
    data = torch.rand(8, 2)
    memory = remembered(Counting(), (data,))
    memory((data,))  # and does not get further
    teacher = Counting()
    again = remembered(teacher, (data,))
    again((data,))
    again.close()
    memory.close()
    assert teacher.batches == 1
    assert not list(outputs_folder().iterdir())  # neither was of any use
    cut = remembered(Counting(), (data,))
    cut((data,)), cut((data,))
    cut.close()
    (kept,) = (p for p in outputs_folder().iterdir() if not p.name.startswith("."))
    kept.write_bytes(kept.read_bytes()[:-5])  # a torn record is none
    last = Counting()
    torn = remembered(last, (data,))
    assert torch.equal(torn((data[:7],)), data[:7] * 2)
    assert torch.equal(torn((data,)), data * 2)
    assert last.batches == 1


def test_keys_tell_examples_apart_and_same_ones_together():
    image = torch.rand(64, 3, 8, 8)
    keys = example_keys((image,))
    assert len(set(keys)) == 64
    assert example_keys((image.contiguous(memory_format=torch.channels_last),)) == keys
    changed = image.clone()
    changed[5, 2, 7, 7] = torch.nextafter(changed[5, 2, 7, 7], torch.tensor(2.0))
    assert [a == b for a, b in zip(keys, example_keys((changed,)), strict=True)].count(False) == 1
    tokens = torch.tensor([[1, 2, 0]])
    assert example_keys((tokens,)) != example_keys((tokens[:, :2],)) != example_keys((torch.tensor([[2, 1]]),))
    assert example_keys((tokens, tokens + 1)) != example_keys((tokens + 1, tokens))


def test_distillation_ends_at_the_same_weights_with_and_without_the_cache():
    student, task = mlp(), small_task(mlp(5), calibration_batches=list(torch.rand(24, 4).split(6)))
    distill = Distill(epochs=3, lr=0.05, precision=PLAIN)
    ends = [replace(distill, cache=cache)(trace(student, X), task) for cache in (False, True, True)]
    counts = [end.history[-1]["found"].get("teacher_batches") for end in ends]
    assert counts == [None, {"asked": 4, "found": 8}, {"asked": 0, "found": 12}]
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0].tensors(), other.tensors(), strict=True))


def test_deterministic_training_keeps_no_outputs():
    task = small_task(mlp(5), calibration_batches=list(torch.rand(24, 4).split(6)))
    found = Distill(epochs=2, deterministic=True)(trace(mlp(), X), task).history[-1]["found"]
    assert "teacher_batches" not in found
    assert not outputs_folder().exists()


def test_history_of_a_distilled_network_can_be_written():
    task = small_task(mlp())
    distilled = Distill(epochs=1, teacher=[mlp(1), mlp(2)], precision=PLAIN)(trace(task.model, X), task)
    json.dumps(distilled.history)
    assert check_teacher(open_teacher(distilled, "cpu"), (X,), torch.zeros(6, 3)).shape == (6, 3)
