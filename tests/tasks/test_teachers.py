import math

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.engine.test_loop import assert_same, load
from tests.tiny import few_digits, run_of, tiny_recipe
from vim.engine.build import published_layer_decay
from vim.engine.students import distance
from vim.errors import UserError
from vim.tasks.classification.candidates import load_candidate
from vim.tasks.pretraining.masked import Masked, MaskingTeacher, sinusoids

TEACHER = {"teacher__model_name": "test_vim"} | {
    f"teacher__{key}": value
    for key, value in {"img_size": 16, "in_chans": 1, "patch_size": 4, "embed_dim": 24, "depth": 1}.items()
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    few_digits(monkeypatch)


def test_a_distilled_student_goes_on_exactly_and_leaves_its_second_head_behind(tmp_path):
    config = tiny_recipe(**TEACHER, train__save_updates=1, train__keep=9, train__ema_decay=0.9)
    run_of(config, tmp_path / "whole").fit()
    trainer = run_of(config, tmp_path / "other", tmp_path / "whole/last.3.pth")
    trainer.fit()
    whole = load(tmp_path / "whole/last.pth")
    assert_same(load(tmp_path / "other/last.pth"), whole)
    assert "distill_head.1.weight" in whole["training"]["model"]
    for weights in ("ema", "raw"):
        candidate = load_candidate(tmp_path / "whole/last.pth", weights=weights)
        assert candidate.model.state_dict().keys() == trainer.task.model.state_dict().keys()


def test_a_teacher_is_followed(tmp_path):
    config = tiny_recipe(**TEACHER, schedule__num_epochs=6, optimizer__lr=0.01)
    trainer = run_of(config, tmp_path)
    before = [parameter.clone() for parameter in trainer.task.teacher.parameters()]

    def far():
        trainer.student.eval()
        with torch.no_grad():
            return float(distance(trainer.student(images)[1], trainer.task.teacher.forward_features(images)))

    images = torch.randn(8, 1, 16, 16)
    start = far()
    trainer.fit()
    assert far() < 0.8 * start
    for one, other in zip(before, trainer.task.teacher.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_teacher_of_other_tokens(tmp_path):
    with pytest.raises(UserError, match="no such model: nothing"):
        run_of(tiny_recipe(teacher__model_name="nothing"), tmp_path)
    with pytest.raises(UserError, match=r"must be the model's, \(1, None, 16, 16, 17\): got \(3, None, 64, 64, 17\)"):
        run_of(tiny_recipe(teacher__model_name="test_vim"), tmp_path)


def test_distance_of_angles():
    a, b = torch.eye(2)
    assert distance(a, 3 * a) == pytest.approx(0)
    assert distance(a, b) == pytest.approx(2)
    assert distance(a, -b - a) == pytest.approx(2 + math.sqrt(2))


def test_sinusoids():
    places = sinusoids(7, 6)
    assert places.shape == (7, 6)
    torch.testing.assert_close(places[3, 2], torch.tensor(math.sin(3 / 10000 ** (2 / 6))))
    torch.testing.assert_close(places[3, 5], torch.tensor(math.cos(3 / 10000 ** (4 / 6))))


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", num_classes=5).eval()


def test_what_a_masking_teacher_shows_and_says(vit):
    teacher, clips = MaskingTeacher(vit, ratio=0.8), torch.randn(2, 3, 4, 160, 160)
    visible, features = teacher(clips)
    assert visible.shape == (2, 4 * 20)
    assert features.shape == (2, 1 + 4 * 20, 5)
    assert all(len(set(row.tolist())) == 80 for row in visible)
    assert (visible.view(2, 4, 20) // 100 == torch.arange(4).view(1, 4, 1)).all()
    with torch.no_grad():
        patches, prefix = vit.forward_intermediates(
            clips[1, :, 2:3].transpose(0, 1), 1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )[0]
        want = F.normalize(vit.head(patches[0, visible[1, 40] - 200]), dim=-1)
    torch.testing.assert_close(features[1, 1 + 40], want)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 81))


def test_a_masking_teacher_prefers_what_it_attends_to(vit, monkeypatch):
    teacher = MaskingTeacher(vit, ratio=0.9)
    frames = torch.randn(1, 3, 160, 160)
    weights = []
    attend = teacher._attention

    def seen(attention, x):
        weights.append(attend(attention, x))
        return 1e-8 + (torch.arange(100) % 10 == 3).float().expand(1, 100)

    monkeypatch.setattr(teacher, "_attention", seen)
    visible, _ = teacher(frames.unsqueeze(2))
    assert (visible % 10 == 3).all()
    # timm's own attention, not fused
    attention = vit.blocks[-1].attn
    kept = []
    handle = attention.attn_drop.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    monkeypatch.setattr(attention, "fused_attn", False)
    with torch.no_grad():
        vit(frames)
    handle.remove()
    torch.testing.assert_close(weights[0], kept[0].mean(1)[:, 0, 1:])


def test_a_teacher_that_does_not_attend():
    with pytest.raises(ValueError, match="the teacher must be a vision transformer with a class token, got ResNet"):
        MaskingTeacher(timm.create_model("test_resnet"), ratio=0.8)


def test_a_masked_student_sees_only_what_is_shown():
    model = timm.create_model("test_videomamba", num_frames=2, num_classes=0).eval()
    student, clips = Masked(model, 7).eval(), torch.randn(2, 3, 2, 64, 64)
    count = model.patch_embed.num_patches
    visible = torch.tensor([[0, 3, count + 1], [2, count, 2 * count - 1]])
    changed = clips.clone()
    changed[0, :, 0, 16:32, :16] = 0  # the first patch of the second row, which is not shown
    with torch.no_grad():
        out = student(clips, visible)
        assert out.shape == (2, 4, 7)
        torch.testing.assert_close(student(changed, visible), out)
        shown = changed.clone()
        shown[0, :, 0, :16, :16] = 0
        assert not torch.allclose(student(shown, visible)[0], out[0], atol=1e-3)
        everything = torch.arange(2 * count).expand(2, -1)
        torch.testing.assert_close(model.forward_visible(clips, everything), model.forward_features(clips))


def test_published_layer_decay_freezes_the_stem_alone():
    model = timm.create_model("test_videomamba", num_frames=2)
    groups = published_layer_decay(model, layer_decay=0.75, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    skipped = model.no_weight_decay()
    for group in groups:
        early = group["lr_scale"] != 1
        assert group["lr_scale"] in (1, 0.75 ** (len(model.layers) + 1))
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert early == name.startswith(("cls_token", "pos_embed", "patch_embed")), name
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1 or name in skipped), name


def test_published_layer_decay_is_videomambas():
    with pytest.raises(ValueError, match="published_decay is VideoMamba's, and the model is ViM2: leave it out"):
        published_layer_decay(timm.create_model("test_vim2"), layer_decay=0.75, weight_decay=0.05)


def test_published_layer_decay_in_a_config(tmp_path):
    config = tiny_recipe(optimizer__layer_decay=0.5, optimizer__published_decay=True)
    trainer = run_of(config, tmp_path)
    assert {group["lr_scale"] for group in trainer.optimizer.param_groups} == {1.0, 0.125}


def test_layer_decay_and_a_teacher(tmp_path):
    with pytest.raises(UserError, match="layer_decay and a teacher do not go together"):
        run_of(tiny_recipe(**TEACHER, optimizer__layer_decay=0.5), tmp_path)
