"""Mixtures of experts against loops over tokens, and their loss in training."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vim  # noqa: F401  registers the models
from vim.layers.moe import SoftMixture, SwitchMixture

ROUTERS = ["soft", "top1"]
D, E = 6, 3


def expert(mixture, number, x):
    own = mixture.experts
    hidden = x @ own.up_weight[number] + own.up_bias[number]
    return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) @ own.down_weight[number] + own.down_bias[number]


def soft_loop(mixture, image):
    """What the paper's formulas give for one image, (l, d), a slot and a token at a time."""
    slots = [slot / slot.norm() for slot in mixture.slots.T]
    logits = torch.stack([torch.cat([mixture.scale * (x @ slot) / x.norm() for slot in slots]) for x in image])
    outputs = []
    for s in range(len(slots)):
        weights = logits[:, s].exp()
        mean = sum(weight * x for weight, x in zip(weights / weights.sum(), image, strict=True))
        outputs.append(expert(mixture, s // mixture.num_slots, mean))
    tokens = []
    for row in logits:
        tokens.append(sum(weight * y for weight, y in zip(row.exp() / row.exp().sum(), outputs, strict=True)))
    return torch.stack(tokens)


def top1_loop(mixture, image, places):
    """The switch router for one image, (l, d), with so many places at an expert; and which tokens had one."""
    taken, tokens, kept = [0] * mixture.num_experts, [], []
    for x in image:
        scores = (x @ mixture.router).exp()
        number = int(scores.argmax())
        kept.append(taken[number] < places)
        taken[number] += 1
        y = expert(mixture, number, x) * scores[number] / scores.sum()
        tokens.append(y if kept[-1] else torch.zeros_like(y))
    return torch.stack(tokens), kept


@pytest.mark.parametrize("num_slots", [1, 4])
def test_soft_mixture(num_slots):
    torch.manual_seed(0)
    mixture = SoftMixture(D, num_experts=E, num_slots=num_slots, dtype=torch.float64)
    torch.nn.init.constant_(mixture.scale, 2.5)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    y, aux_loss = mixture(x)
    torch.testing.assert_close(y, torch.stack([soft_loop(mixture, image) for image in x]))
    assert aux_loss is None
    y.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mixture.parameters())
    for parameter in mixture.experts.parameters():
        assert all(grad.abs().sum() > 0 for grad in parameter.grad)  # of every expert


# for 10 tokens and 3 experts, rounded up
@pytest.mark.parametrize(("factor", "places"), [(0.5, 2), (0.9, 3), (1.2, 4), (1.25, 5), (100, 400)])
def test_top1_mixture(factor, places):
    torch.manual_seed(0)
    mixture = SwitchMixture(D, num_experts=E, capacity_factor=factor, dtype=torch.float64).eval()
    x = torch.randn(2, 10, D, dtype=torch.float64)
    mixture.router.data[:, 0] = x.sum((0, 1))  # most tokens choose the first
    loops = [top1_loop(mixture, image, places) for image in x]
    torch.testing.assert_close(mixture(x)[0], torch.stack([y for y, _ in loops]))
    assert all(all(kept) for _, kept in loops) == (factor == 100)  # the others drop some tokens


def test_tokens_without_a_place_pass_by_the_residual():
    block = experts(num_experts=2, capacity_factor=1.0).eval().layers[1].moe
    torch.nn.init.zeros_(block.mixture.router)  # all tokens choose the first expert
    x = torch.randn(2, 9, 64)
    y = block(x)
    assert torch.equal(y[:, 5:], x[:, 5:])
    assert (y[:, :5] != x[:, :5]).any(-1).all()


def aux_loss(logits, weight=0.5):
    """The loss of a router whose tokens have these logits, (b, l, e)."""
    e = logits.shape[-1]
    mixture = SwitchMixture(e, num_experts=e, aux_weight=weight, dtype=torch.float64)
    mixture.router.data = torch.eye(e, dtype=torch.float64)
    return mixture(logits.double())[1].item()


def test_the_loss_of_balanced_and_of_collapsed_routing():
    one_each = 50 * F.one_hot(torch.arange(8) % 4, 4).view(2, 4, 4)
    assert aux_loss(one_each) == pytest.approx(0.5)
    assert aux_loss(torch.zeros(2, 4, 4)) == pytest.approx(0.5)  # equal probabilities
    all_to_one = 50 * F.one_hot(torch.zeros(2, 4, dtype=torch.long), 4)
    assert aux_loss(all_to_one) == pytest.approx(0.5 * 4)
    assert aux_loss(all_to_one, weight=0) == 0
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    chosen = logits.argmax(-1).flatten().tolist()
    fractions = [chosen.count(number) / 10 for number in range(4)]
    means = (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean((0, 1)).tolist()
    assert aux_loss(logits) == pytest.approx(0.5 * 4 * sum(f * p for f, p in zip(fractions, means, strict=True)))


def test_the_loss_takes_tokens_from_the_expert_that_has_too_many():
    mixture = SwitchMixture(4, num_experts=4, aux_weight=1.0)
    mixture.router.data = torch.eye(4)
    mixture(torch.eye(4)[torch.tensor([[0, 0, 0, 1]])])[1].backward()
    assert mixture.router.grad[0, 0] > 0 > mixture.router.grad[0, 2]


def experts(router="top1", **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 3, "moe_every": 1, "router": router, **options}
    return timm.create_model("test_vim_moe", **options)


def test_which_blocks_have_experts():
    model = timm.create_model("test_vim", depth=7, moe_every=3, drop_path_rate=0.6)
    assert [layer.moe is not None for layer in model.layers] == [False, False, True, False, False, True, False]
    assert [model.layers[i].moe.drop_path.drop_prob for i in (2, 5)] == pytest.approx([0.2, 0.5])
    assert {"layers.2.moe.mixture.experts.up_bias", "layers.5.moe.mixture.experts.down_bias"} <= model.no_weight_decay()
    assert "layers.2.moe.mixture.experts.up_weight" not in model.no_weight_decay()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("class_token", ["middle", "ends", "none"])
def test_an_image_does_not_depend_on_the_others(router, class_token):
    few = {"capacity_factor": 0.5} if router == "top1" else {}
    model = experts(router, class_token=class_token, **few).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_do_for_images_of_any_size(router):
    model, larger = experts(router), experts(router, img_size=48)
    model.set_input_size(48)
    larger.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(larger.eval()(image), model.eval()(image))


@pytest.mark.parametrize(
    ("checkpointing", "compiled"), [(False, False), (True, False), (False, True)], ids=["plain", "again", "compiled"]
)
def test_the_loss_of_a_batch_in_training(checkpointing, compiled):
    """It is the sum over the blocks, and its gradient too. Computing a block again makes no second loss."""
    model, images = experts(drop_path_rate=0.3, depth=1 if compiled else 2, embed_dim=16), torch.randn(4, 3, 32, 32)
    if checkpointing:
        model.set_grad_checkpointing()
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="eager", fullgraph=True)
    torch.manual_seed(1)
    logits = model(images)
    found, losses = model.aux_loss, [layer.moe.aux_loss for layer in model.layers]
    (found + 0 * logits.sum()).backward()
    assert all(layer.moe.aux_loss is loss for layer, loss in zip(model.layers, losses, strict=True))

    # the same by hand
    torch.manual_seed(1)
    x, wanted = model._embed(images)[0], 0.0
    for layer in model.layers:
        x = x + layer.drop_path(layer.mixer(layer.norm(x)))
        y, loss = layer.moe.mixture(layer.moe.norm(x))
        x, wanted = x + layer.moe.drop_path(y), wanted + loss
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient)


def test_a_copy_of_a_model_in_training():
    model = experts()
    assert model.aux_loss == 0  # before the first batch
    model(torch.randn(1, 3, 32, 32))
    loss = model.aux_loss
    assert loss > 0 and loss.requires_grad
    assert copy.deepcopy(model).aux_loss == 0
    model.eval()(torch.randn(1, 3, 32, 32))
    assert model.aux_loss == loss
    assert not any("aux" in name for name in model.state_dict())
    assert experts("soft").aux_loss is None
    assert timm.create_model("test_vim").aux_loss is None


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_choose_in_float32_within_autocast(router, monkeypatch):
    mixture, x = experts(router).eval().layers[0].moe.mixture, torch.randn(1, 17, 64)
    logits, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: logits.append(x) or softmax(x, dim))
    whole = mixture(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = mixture(x)
    assert torch.equal(logits[0], logits[len(logits) // 2])
    assert y.dtype == torch.bfloat16 or router == "top1"
    torch.testing.assert_close(y.float(), whole, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_every": 0}, "moe_every must be at least 1"),
        ({"moe_every": 4}, "moe_every must be at most the depth, 3, got 4"),
        ({"model_name": "test_vim", "num_experts": 4}, "num_experts must be left out without moe_every, got 4"),
        ({"router": "top2"}, "router must be one of"),
        ({"router": "soft", "aux_weight": 0.1}, "aux_weight must be left out with router='soft', got 0.1"),
        ({"router": "top1", "num_slots": 4}, "num_slots must be left out with router='top1', got 4"),
        ({"router": "top1", "aux_weight": -1.0}, "aux_weight must be a number of at least 0, got -1.0"),
        ({"router": "top1", "capacity_factor": 0.0}, "capacity_factor must be a number of at least 0.001, got 0.0"),
        ({"router": "top1", "capacity_factor": "a"}, "capacity_factor must be a number of at least 0.001, got 'a'"),
        ({"router": "top1", "aux_weight": "a"}, "aux_weight must be a number of at least 0, got 'a'"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
    ],
    ids=str,
)
def test_options_that_make_no_experts(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(**{"model_name": "test_vim_moe", **options})


def test_experts_take_neither_padding_nor_pieces():
    block = experts().layers[0]
    with pytest.raises(AssertionError, match="experts know no padding"):
        block(torch.randn(1, 4, 64), None, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(AssertionError, match="all tokens of a sequence at once"):
        block.step(torch.randn(1, 4, 64), None)
