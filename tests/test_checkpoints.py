import re

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import vim.checkpoints
from tests.weight_files import (
    AVERAGE,
    BIAS,
    CONV,
    FEATURES,
    HEAD,
    NORM,
    TABLE,
    TINY,
    WEIGHTS,
    assert_weights,
    build,
    prefixed,
    published,
    random_weights,
    save,
    without,
)
from vim.engine.weights import save_for_timm
from vim.errors import UserError

PREFIXES = (
    *("module.", "backbone.", "encoder.", "_orig_mod.", "module.backbone.", "_orig_mod.module."),
    *("model.", "net.", "timm_model.", "model._orig_mod.", "module.model."),
)
LAYOUTS = {
    **{prefix: prefixed(prefix) for prefix in PREFIXES},
    "published": published(WEIGHTS, AVERAGE),
    "bare": WEIGHTS,
    "state_dict": {"state_dict": WEIGHTS, "meta": {"epoch": 3}},
    "module": {"module": WEIGHTS},
    "nested": {"model": {"state_dict": WEIGHTS}},
    "Lightning": {"state_dict": prefixed("model."), "epoch": 9, "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod."), "pytorch-lightning_version": "2.5"},
    "AveragedModel": prefixed("module.") | {"n_averaged": torch.tensor(7)},
    "AveragedModel, wrapped": {"model_ema": prefixed("module.") | {"n_averaged": torch.tensor(7)}, "model": WEIGHTS},
    "DeepSpeed": {"module": prefixed("module."), "ds_config": {"a": 1}, "buffer_names": []},
    **{key: {key: WEIGHTS, "epoch": 3} for key in ("model_state_dict", "net", "weights", "model_state", "network")},
    "only an average": {"ema_state_dict": WEIGHTS, "epoch": 3},
    "unused": WEIGHTS | {"rope.freqs_cos": torch.ones(4)},
    "unused, of another prefix": prefixed("module.encoder.") | {"module.rope.freqs_cos": torch.ones(4)},
    "parameters": {key: torch.nn.Parameter(value) for key, value in WEIGHTS.items()},
    "views": {key: torch.stack([value, value], -1)[..., 1] for key, value in WEIGHTS.items()},
    "float16": {key: value.half() for key, value in WEIGHTS.items()},
    "bfloat16": {key: value.bfloat16() for key, value in WEIGHTS.items()},
    "float64": {key: value.double() for key, value in WEIGHTS.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    assert_weights(build(save(tmp_path / "weights.pth", LAYOUTS[layout])), WEIGHTS)


@pytest.mark.parametrize("layout", ["bare", "encoder.", "timm_model.", "model.", "unused", "float16", "bfloat16"])
def test_safetensors(layout, tmp_path):
    safetensors.torch.save_file(LAYOUTS[layout], tmp_path / "weights.safetensors")
    assert_weights(build(tmp_path / "weights.safetensors"), WEIGHTS)


def test_a_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "weights.pth", WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_weights(build(path), WEIGHTS)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_the_running_average(key, tmp_path):
    path, model = save(tmp_path / "weights.pth", {"model": WEIGHTS, key: AVERAGE}), build()
    vim.checkpoints.load_pretrained(model, path, use_ema=True)
    assert_weights(model, AVERAGE)
    model.load_pretrained(str(path))
    assert_weights(model, WEIGHTS)
    assert_weights(build(checkpoint_path=path), AVERAGE)  # timm's own loader: the average, and strictly
    save(path, {"model": without(HEAD)})
    with pytest.raises(RuntimeError, match="Missing key"):
        build(checkpoint_path=path)
    with pytest.raises(UserError, match="weights.pth holds no running average"):
        vim.checkpoints.load_pretrained(model, path, use_ema=True)


# Adaptation


def resized(table, old, new):
    """The position table for another grid: the class token's row is the middle one."""
    table, middle = table[0], old[0] * old[1] // 2
    image = torch.cat([table[:middle], table[middle + 1 :]]).T.reshape(1, -1, *old)
    rows = F.interpolate(image, new, mode="bicubic").reshape(table.shape[1], -1).T
    return torch.cat([rows[: len(rows) // 2], table[middle, None], rows[len(rows) // 2 :]])[None]


CONV3, TABLE4X4 = WEIGHTS[CONV], WEIGHTS[TABLE]
ADAPTED = {  # options, and what of the weights they change
    "as it was": ({}, {}),
    "classes": ({"num_classes": 3}, {HEAD: None, BIAS: None}),
    "no classes": ({"num_classes": 0}, {HEAD: None, BIAS: None}),
    "grey": ({"in_chans": 1}, {CONV: CONV3.sum(1, keepdim=True)}),
    "four channels": ({"in_chans": 4}, {CONV: torch.cat([CONV3, CONV3[:, :1]], 1) * 3 / 4}),
    "larger": ({"img_size": 48}, {TABLE: resized(TABLE4X4, (4, 4), (6, 6))}),
    "wider": ({"img_size": (24, 64)}, {TABLE: resized(TABLE4X4, (4, 4), (3, 8))}),
    "as many patches": ({"img_size": (16, 64)}, {TABLE: resized(TABLE4X4, (4, 4), (2, 8))}),
}


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adaptation(name, source, tmp_path, caplog):
    changes, expected = ADAPTED[name]
    path = save(tmp_path / "weights.pth", published(WEIGHTS, AVERAGE))
    if source == "file":
        model = build(path, overlay={"input_size": (3, 32, 32)}, **changes)
    else:
        save_for_timm(build(path), tmp_path / "folder", None, {})
        model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, **changes)
    state = model.state_dict()
    assert_weights(model, WEIGHTS, but=expected)
    for key in [key for key in expected if expected[key] is not None]:
        torch.testing.assert_close(state[key], expected[key])
    if TABLE in expected:  # bit-exact, in the new middle
        assert torch.equal(state[TABLE][:, model.patch_embed.num_patches // 2], TABLE4X4[:, 8])
    new_head = re.search("The head is new: .* was not trained on 3 classes", caplog.text)
    assert bool(new_head) == (name == "classes")
    logits = model(torch.randn(1, model.in_chans, *model.img_size))
    assert logits.shape == (1, changes.get("num_classes", 10) or 16)
    assert logits.isfinite().all()


def test_a_head_that_fits_is_kept(tmp_path, caplog):
    path, tag = save(tmp_path / "weights.pth", WEIGHTS), {"num_classes": 1000}
    assert_weights(build(path, overlay=tag), WEIGHTS)
    assert "The head is new" not in caplog.text
    save(path, without(BIAS))
    with pytest.raises(UserError, match=re.escape(f"{BIAS} is missing there and (10,) in the model")):
        build(path, overlay=tag)


def test_a_state_dict_keeps_its_head():
    overlay = {"file": None, "state_dict": dict(WEIGHTS), "num_classes": 1000}
    assert_weights(timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **TINY), WEIGHTS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_table_that_is_not_square(dynamic, tmp_path):
    trained = build(img_size=(32, 64), dynamic_img_size=dynamic)
    save_for_timm(trained, tmp_path, None, {})
    for size, grid in {(48, 96): (6, 12), (64, 32): (8, 4), (32, 64): (4, 8)}.items():
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size)
        torch.testing.assert_close(model.pos_embed, resized(trained.pos_embed, (4, 8), grid))
        assert_weights(model, trained.state_dict(), but=[TABLE])


@pytest.mark.parametrize("head", [10, 7, 0])
def test_features_take_any_head(head, tmp_path):
    path = save(tmp_path / "weights.pth", random_weights(num_classes=head))
    assert_weights(build(path, **FEATURES).model, random_weights(num_classes=head), but=[NORM, HEAD, BIAS])
