"""What all segmentation heads have in common, by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn

from adala.attention import TokenLayout
from adala.heads import SEGMENTATION_HEADS, build_segmentation_head, semantic_logits
from adala.students import linearize
from adala.tasks.mask_loss import mask_classification_loss

PREFIXES = {0: {"class_token": False, "global_pool": "avg"}, 1: {}, 5: {"reg_tokens": 4}}
# Cells of a mask along an edge, for each patch along it; the tiny teacher's patches have 4 pixels.
MASK_CELLS = {"linear": 1, "pmt": 2, "mask2former": 4}
every_head = pytest.mark.parametrize("name", SEGMENTATION_HEADS)


def tensors(prediction: Any) -> list[Tensor]:
    """All tensors of a prediction."""
    if isinstance(prediction, Tensor):
        return [prediction]
    values = prediction.values() if isinstance(prediction, dict) else prediction
    return [tensor for value in values for tensor in tensors(value)]


def loss_of(prediction: Any, target: Tensor) -> Tensor:
    if isinstance(prediction, Tensor):
        return F.cross_entropy(semantic_logits(prediction, target.shape[1:]), target)
    return mask_classification_loss(prediction, target)


@every_head
@pytest.mark.parametrize("num_prefix_tokens", PREFIXES)
def test_shapes(name: str, num_prefix_tokens: int, build_head: Callable[..., nn.Module]) -> None:
    """Of a grid that is neither square nor the model's own, with an odd edge."""
    model = linearize(build_tiny_teacher(**PREFIXES[num_prefix_tokens]), "linear")
    assert model.num_prefix_tokens == num_prefix_tokens
    layout = TokenLayout((3, 6), num_prefix_tokens)
    features = torch.randn(2, layout.num_tokens, model.embed_dim)
    head = build_head(name, model)
    prediction = head(features, layout)
    cells = (3 * MASK_CELLS[name], 6 * MASK_CELLS[name])
    if name == "linear":
        assert prediction.shape == (2, 3, *cells)
    else:
        assert len(prediction["auxiliary"]) == 2 and head.eval()(features, layout)["auxiliary"] == []
        for output in (prediction, *prediction["auxiliary"]):
            assert output["class_logits"].shape == (2, 6, 4)
            assert output["mask_logits"].shape == (2, 6, *cells)
    assert semantic_logits(prediction, (12, 24)).shape == (2, 3, 12, 24)


@every_head
@pytest.mark.parametrize("num_prefix_tokens", PREFIXES)
@pytest.mark.parametrize("cell", [(0, 0), (0, 4), (1, 2), (1, 3)], ids=str)
def test_a_patch_moves_its_own_place_most(
    name: str, num_prefix_tokens: int, cell: tuple[int, int], build_head: Callable[..., nn.Module]
) -> None:
    model = linearize(build_tiny_teacher(**PREFIXES[num_prefix_tokens]), "linear")
    layout = TokenLayout((2, 5), num_prefix_tokens)
    features = torch.randn(1, layout.num_tokens, model.embed_dim, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[:, num_prefix_tokens + 5 * cell[0] + cell[1]] *= -1
    # Without masks, of which a query may lose one as its patch changes, and then all the map changes.
    options = {"masked_attention": False} if name == "pmt" else {}
    moved = torch.zeros(layout.grid_size)
    for seed in range(3):
        head = build_head(name, model, seed=seed, **options).eval()
        before, after = (tensors(head(tokens, layout))[-1] for tokens in (features, changed))
        moved += F.adaptive_avg_pool2d((after - before).detach().abs(), layout.grid_size).mean((0, 1))
    assert divmod(moved.argmax().item(), 5) == cell


@every_head
def test_a_plain_teacher_will_do(name: str, build_head: Callable[..., nn.Module], teacher, images: Tensor) -> None:
    head = build_head(name, teacher).eval()
    assert semantic_logits(head(teacher.forward_features(images), TokenLayout((4, 4), 1)), (16, 16)).isfinite().all()


@every_head
def test_one_tiny_image_is_learnt(name: str, build_head: Callable[..., nn.Module], teacher, images: Tensor) -> None:
    """Three classes, one of them an island, and a corner that is not labelled."""
    features, layout = teacher.forward_features(images[:1]), TokenLayout((4, 4), 1)
    cells = torch.tensor([[0, 0, 0, 1], [0, 2, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    target = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)[None].clone()
    target[:, :4, :4] = 255
    head = build_head(name, teacher)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2 if name == "linear" else 3e-3)
    labelled = target != 255
    losses = []
    for _ in range(120):
        prediction = head(features, layout)
        if name == "linear":
            # On the grid, where every cell is free: upsampled logits of neighbours cannot all be right.
            loss = F.cross_entropy(prediction, target[:, 2::4, 2::4], ignore_index=255)
        else:
            loss = mask_classification_loss(prediction, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    found = semantic_logits(head.eval()(features, layout), (16, 16)).argmax(1)
    centres = found[:, 2::4, 2::4], target[:, 2::4, 2::4], labelled[:, 2::4, 2::4]
    assert (centres[0] == centres[1])[centres[2]].all()
    assert (found == target)[labelled].float().mean() > 0.85


@every_head
def test_every_parameter_gets_a_gradient(name: str, build_head: Callable[..., nn.Module], student) -> None:
    head = build_head(name, student)
    features = torch.randn(2, 17, student.embed_dim, requires_grad=True)
    target = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    loss_of(head(features, TokenLayout((4, 4), 1)), target).backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []
    assert features.grad[:, 1:].ne(0).any(-1).all()


@every_head
def test_weights_may_be_bf16(name: str, build_head: Callable[..., nn.Module], student: VisionTransformer) -> None:
    head = build_head(name, student)
    rounded = copy.deepcopy(head).bfloat16()
    features = torch.randn(2, 17, student.embed_dim, generator=torch.Generator().manual_seed(0))
    layout = TokenLayout((4, 4), 1)
    prediction = rounded(features.bfloat16(), layout)
    assert {tensor.dtype for tensor in tensors(prediction)} == {torch.bfloat16}
    for tensor, exact in zip(tensors(prediction), tensors(head(features, layout)), strict=True):
        # The median: where a logit lies near zero, rounding decides whether a query attends there, and moves it more.
        assert (tensor - exact).abs().median() < 0.05 * exact.std()
    target = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    loss = loss_of(prediction, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in rounded.parameters())


@every_head
def test_a_seed_decides_a_head_and_a_state_dict_carries_it(
    name: str, build_head: Callable[..., nn.Module], student: VisionTransformer
) -> None:
    first, again, other = build_head(name, student), build_head(name, student), build_head(name, student, seed=1)
    features, layout = torch.randn(2, 17, student.embed_dim), TokenLayout((4, 4), 1)

    def outputs(head: nn.Module) -> list[Tensor]:
        return tensors(head.eval()(features, layout))

    first(features, layout), again(features, layout)
    assert all(map(torch.equal, outputs(first), outputs(again)))
    assert not torch.equal(outputs(first)[0], outputs(other)[0])
    other.load_state_dict(first.state_dict())
    assert all(map(torch.equal, outputs(first), outputs(other)))


@every_head
def test_a_head_can_be_outlined_without_memory(name: str, build_head: Callable[..., nn.Module], student) -> None:
    with torch.device("meta"):
        outline = build_head(name, student)
    counts = {key: value.shape for key, value in build_head(name, student).named_parameters()}
    assert {key: value.shape for key, value in outline.named_parameters()} == counts


def test_an_unknown_head_is_told_which_there_are(student: VisionTransformer) -> None:
    with pytest.raises(ValueError, match="unknown segmentation head 'fcn': known are linear, mask2former, pmt"):
        build_segmentation_head("fcn", student, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"dropout": 0.1}, "head linear has no option 'dropout': it has over_ranks"),
        ("linear", {"over_ranks": 1}, "head linear: over_ranks is 1: it must be true or false"),
        ("pmt", {"queries": 3}, "head pmt has no option 'queries': it has num_queries, num_blocks, "),
        ("pmt", {"num_blocks": 0}, "num_blocks is 0: it must be a whole number, 1 or more"),
        ("pmt", {"num_queries": True}, "num_queries is True: it must be a whole number, 1 or more"),
        ("pmt", {"num_queries": 2.0}, "num_queries is 2.0: it must be a whole number, 1 or more"),
        ("pmt", {"mlp_ratio": float("nan")}, "mlp_ratio is nan: it must be a number above 0"),
        ("pmt", {"mlp_ratio": 0}, "mlp_ratio is 0: it must be a number above 0"),
        ("pmt", {"patch_attention": None}, "patch_attention is None: it must be a name"),
        ("pmt", {"patch_attention_options": ["a"]}, "it must be a mapping"),
        ("pmt", {"patch_attention": "lineer"}, "unknown mechanism 'lineer': known are softmax, linear"),
        ("pmt", {"patch_attention_options": {"den_added": 1.0}}, "name it in patch_attention"),
        ("mask2former", {"width": 48}, "width 48 must be a multiple of 32 and of num_heads"),
        ("mask2former", {"width": 64, "num_heads": 6}, "multiple of 32 and of num_heads \\(6\\)"),
    ],
)
def test_wrong_options_are_named(student: VisionTransformer, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmentation_head(name, student, 3, options)


def test_semantic_logits_of_a_dense_head_are_upsampled_between_centres() -> None:
    logits = torch.tensor([[[[0.0, 4.0]]]], dtype=torch.bfloat16)
    upsampled = semantic_logits(logits, (2, 4))
    assert upsampled.dtype == torch.float32
    # Centres of the pixels lie at 1/4 and 3/4 of a cell: half-way between cells the two mix, outside they stay.
    assert upsampled.tolist() == [[[[0.0, 1.0, 3.0, 4.0]] * 2]]


def test_semantic_logits_of_a_mask_head_are_classes_times_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
    found = semantic_logits({"class_logits": classes, "mask_logits": masks, "auxiliary": []}, (6, 9))
    upsampled = F.interpolate(masks.double(), (6, 9), mode="bilinear", align_corners=False)
    expected = torch.zeros(2, 3, 6, 9, dtype=torch.float64)
    for query in range(5):
        share = classes[:, query].double().exp() / classes[:, query].double().exp().sum(1, keepdim=True)
        expected += share[:, :3, None, None] / (1 + (-upsampled[:, query, None]).exp())
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
