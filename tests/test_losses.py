import math

import pytest
import torch
import torch.nn.functional as F

from edgepress.compress import losses
from edgepress.compress.errors import RecipeError


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(teacher, student, dim=1):
    p, q = teacher.softmax(dim), student.softmax(dim)
    return (p * (p / q).log()).sum(dim)


def test_logit_distillation_equals_its_closed_form():
    student, teacher, t = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -2.0]]), 2.0
    p = 1 / (1 + math.exp(-4 / t))
    q = 1 / (1 + math.exp(2 / t))
    expected = t * t * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert float(losses.logit_distillation(student, teacher, t)) == pytest.approx(expected, rel=1e-5)


def test_decoupled_parts_must_add_up_to_the_undivided_loss():
    """Zhao et al. (2022), equation 6: KD = TCKD + (1 - p_target) NCKD, for each example."""
    student, teacher, t = logits(1, 5), logits(1, 5, seed=1), 4.0
    for target in range(5):
        classes = torch.tensor([target])
        others = 1 - float((teacher / t).softmax(1)[0, target])
        parts = losses.decoupled_distillation(student, teacher, classes, t, alpha=1.0, beta=others)
        assert float(parts) == pytest.approx(float(losses.logit_distillation(student, teacher, t)), rel=1e-4)


def test_decoupled_target_part_sees_nothing_of_how_the_others_share():
    teacher, classes = logits(3, 4), torch.tensor([0, 2, 3])
    student = torch.zeros(3, 4)
    student[torch.arange(3), classes] = teacher.gather(1, classes[:, None])[:, 0]
    rest = teacher.masked_fill(F.one_hot(classes, 4).bool(), -math.inf).logsumexp(1)
    student = torch.where(F.one_hot(classes, 4).bool(), student, (rest - math.log(3))[:, None])
    assert float(losses.decoupled_distillation(student, teacher, classes, 1.0, alpha=1.0, beta=0.0)) == pytest.approx(0, abs=1e-6)
    assert float(losses.decoupled_distillation(student, teacher, classes, 1.0, alpha=0.0, beta=1.0)) > 0.01


def test_decoupled_loss_serves_dense_predictions():
    student, teacher, classes = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1), torch.randint(0, 3, (2, 4, 5))
    flat = [x.movedim(1, -1).reshape(-1, 3) for x in (student, teacher)]
    expected = losses.decoupled_distillation(*flat, classes.flatten(), 2.0)
    assert float(losses.decoupled_distillation(student, teacher, classes, 2.0)) == pytest.approx(float(expected))


def test_token_distillation_is_the_mean_over_tokens_without_padding():
    student, teacher = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    each = kl(teacher / 2, student / 2, -1) * 4
    expected = (each[0, 0] + each[0, 1] + each[1, 0]) / 3
    assert float(losses.token_distillation(student, teacher, mask, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.token_distillation(student, teacher, None, 2.0)) == pytest.approx(float(each.mean()), rel=1e-5)
    assert float(losses.token_distillation(student, teacher, torch.zeros(2, 3), 2.0)) == 0.0


def test_output_distillation_counts_in_units_of_the_teachers_variance():
    teacher = torch.tensor([0.0, 2.0])  # variance 1
    assert float(losses.output_distillation(teacher + 3, teacher)) == pytest.approx(9.0)
    assert float(losses.output_distillation((teacher + 3, 100 * teacher), (teacher, 100 * teacher))) == pytest.approx(4.5)


def test_detector_boxes_count_where_the_teacher_sees_something():
    boxes, scores = torch.zeros(1, 2, 4), torch.tensor([[[0.0, 30.0], [30.0, 0.0]]])  # something, nothing
    there, nowhere = boxes.clone(), boxes.clone()
    there[0, 0], nowhere[0, 1] = 2.0, 2.0
    assert float(losses.detection_distillation(there, scores, boxes, scores, background=0)) == pytest.approx(1.5, rel=1e-5)
    assert float(losses.detection_distillation(nowhere, scores, boxes, scores, background=0)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("background", [None, 0])
def test_detector_scores_count_everywhere(background):
    boxes, teacher, student = torch.zeros(2, 3, 4), logits(2, 3, 2), logits(2, 3, 2, seed=1)
    if background is None:
        p, q = teacher.sigmoid(), student.sigmoid()
        each = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
        confidence = p.amax(-1).sum()
    else:
        each, confidence = kl(teacher, student, -1).sum(), (1 - teacher.softmax(-1)[..., 0]).sum()
    found = losses.detection_distillation(boxes, student, boxes, teacher, background=background)
    assert float(found) == pytest.approx(float(each / confidence.clamp_min(1.0)), rel=1e-4)


def test_attention_transfer_must_not_see_scale_or_channels():
    teacher = logits(2, 6, 3, 3)
    assert float(losses.attention_transfer(5 * teacher, teacher)) == pytest.approx(0.0, abs=1e-9)
    assert float(losses.attention_transfer(teacher[:, [3, 1, 0, 2, 5, 4]], teacher)) == pytest.approx(0.0, abs=1e-9)
    one, other = torch.zeros(1, 1, 4), torch.zeros(1, 3, 4)
    one[0, 0, 0], other[0, 1, 2] = 2.0, 5.0  # each looks at one of four positions, at different ones: (1 + 1) / 4
    assert float(losses.attention_transfer(one, other)) == pytest.approx(0.5)


def test_similarity_preserving_equals_its_closed_form():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    half = 1 / math.sqrt(2)  # rows of the student's matrix; the teacher's is the identity
    expected = (2 * (1 - half) ** 2 + 2 * half**2) / 4
    assert float(losses.similarity_preserving(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_relational_must_not_see_motions_and_scale():
    teacher = logits(5, 4)
    turn, _ = torch.linalg.qr(logits(4, 4, seed=2))
    assert float(losses.relational(3 * teacher @ turn + 1, teacher)) == pytest.approx(0.0, abs=1e-4)


def test_relational_distances_and_angles_equal_their_closed_forms():
    line, corner = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mean, means = 4 / 3, (2 + math.sqrt(2)) / 3
    pairs = [(1, 1), (1, math.sqrt(2)), (2, 1)]  # distances of points 0 and 1, 1 and 2, 0 and 2
    expected = 2 * sum(0.5 * (a / mean - b / means) ** 2 for a, b in pairs) / 9
    assert float(losses.relational(line, corner, distance=1.0, angle=0.0)) == pytest.approx(expected, rel=1e-4)
    # angles at the three points: 0, 180, 0 degrees on the line, 90, 45, 45 in the corner; each pair of directions twice
    cosines = [(1.0, 0.0), (-1.0, math.sqrt(0.5)), (1.0, math.sqrt(0.5))]
    smooth = [0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in cosines]
    assert float(losses.relational(line, corner, distance=0.0, angle=1.0)) == pytest.approx(2 * sum(smooth) / 27, rel=1e-4)


FEATURES = [losses.feature_hints, losses.attention_transfer, losses.similarity_preserving, losses.relational]


@pytest.mark.parametrize("loss", FEATURES)
def test_inner_losses_vanish_on_equals_and_have_finite_gradients(loss):
    teacher = logits(4, 3, 5, 5)
    teacher[1] = teacher[0]  # two examples alike, and one of nothing but zeros
    teacher[2] = 0.0
    assert float(loss(teacher.clone(), teacher)) == pytest.approx(0.0, abs=1e-5)
    other = logits(4, 3, 5, 5, seed=3)
    other[1], other[2] = other[0], 0.0
    other.requires_grad_()
    loss(other, teacher).backward()
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0


def test_losses_lead_the_student_to_the_teacher():
    teacher, classes = logits(6, 4), torch.randint(0, 4, (6,))
    for loss in (
        lambda s: losses.logit_distillation(s, teacher, 2.0),
        lambda s: losses.decoupled_distillation(s, teacher, classes, 2.0),
        lambda s: losses.token_distillation(s[:, None], teacher[:, None], None, 2.0),
    ):
        student = logits(6, 4, seed=9).requires_grad_()
        optimizer = torch.optim.Adam([student], lr=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            loss(student).backward()
            optimizer.step()
        assert float((student.detach().softmax(1) - teacher.softmax(1)).abs().max()) < 0.01


def test_half_precision_is_computed_in_float():
    a, b = logits(4, 3, 5, 5), logits(4, 3, 5, 5, seed=1)
    for loss in FEATURES:
        assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert losses.logit_distillation(a.bfloat16(), b.bfloat16(), 1.0).dtype == torch.float32


def test_outputs_that_are_not_one_tensor_of_logits_are_refused():
    with pytest.raises(RecipeError, match="not one tensor of logits"):
        losses.only((torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(RecipeError, match="not one tensor of logits"):
        losses.only(torch.zeros(3))
    assert losses.only({"logits": torch.ones(2, 3), "hidden": torch.tensor([1])}).shape == (2, 3)
