import re

import pytest
import safetensors.torch
import torch

from tests.weight_files import (
    BIAS,
    CONV,
    FEATURES,
    HEAD,
    NORM,
    PROJ,
    TABLE,
    WEIGHTS,
    assert_refused,
    assert_weights,
    build,
    prefixed,
    random_weights,
    save,
    without,
)
from vim.engine.weights import load_published
from vim.errors import UserError

CONV3, TABLE4X4 = WEIGHTS[CONV], WEIGHTS[TABLE]


def but(key, value):
    """The weights with one tensor changed."""
    return WEIGHTS | {key: value}


def broken(key, number, dtype=torch.float32):
    """With one number changed."""
    value = WEIGHTS[key].to(dtype).clone()
    value.view(-1)[-1] = number
    return but(key, value)


def other(key, there, here):
    return re.escape(f"weights.pth is of another model: {key} is {there} there and {here} in the model")


def not_finite(key, count, total):
    return f"{key} holds {count} numbers that are not finite, of {total}"


NAN, INF = float("nan"), float("inf")
EMPTY, DEEPER, SHALLOWER = other("cls_token", "missing", (1, 1, 16)), random_weights(depth=3), random_weights(depth=1)
WRONG = {  # the content of a file, and the error
    "list": ([WEIGHTS], "expected a dict of tensors, got list"),
    "tensor": (torch.ones(3), "expected a dict of tensors, got Tensor"),
    "empty": ({}, EMPTY),
    "empty model": ({"model": {}}, EMPTY),
    "numbers": (but(PROJ, 1.0), f"holds no state dict: {PROJ} is a float, not a tensor"),
    "nothing": (but(PROJ, None), f"holds no state dict: {PROJ} is a NoneType, not a tensor"),
    "numbered": (dict(enumerate(WEIGHTS.values())), "holds no state dict: expected names of tensors, got a int"),
    "another wrapper": (
        {"generator": WEIGHTS, "a\x1b[31m": 3},
        re.escape(r"holds no state dict: generator is a dict, not a tensor; its entries are generator, a\x1b[31m"),
    ),
    "itself": ((lambda wrapper: wrapper.update(model=wrapper) or wrapper)({}), "holds no state dict: model is a dict"),
    "two networks": (
        prefixed("student.") | {"critic.weight": torch.ones(3)},
        re.escape("cls_token is missing there and (1, 1, 16) in the model, and")
        + ".*; its entries are student.cls_token",
    ),
    "nan": (broken(PROJ, NAN), not_finite(PROJ, 1, 1024)),
    "nan in the norm": (broken(NORM, NAN), not_finite(NORM, 1, 16)),
    "infinite": (broken(TABLE, -INF), not_finite(TABLE, 1, 272)),
    "infinite in float32": (broken(PROJ, 1e300, torch.float64), not_finite(PROJ, 1, 1024)),
    "all nan": (but(CONV, CONV3 * NAN), not_finite(CONV, 3072, 3072)),
    "resnet": ({"conv1.weight": torch.ones(64, 3, 7, 7), "fc.weight": torch.ones(9, 9)}, EMPTY),
    "batch norm": (but("bn1.num_batches_tracked", torch.tensor(3)), other("bn1.num_batches_tracked", (), "missing")),
    "width": (random_weights(embed_dim=8), other("cls_token", (1, 1, 8), (1, 1, 16))),
    "deeper": (DEEPER, other("layers.2.norm.weight", (16,), "missing") + ", and 16 more differ"),
    "shallower": (SHALLOWER, other("layers.1.norm.weight", "missing", (16,)) + ", and 16 more differ"),
    "states": (random_weights(d_state=8), other("layers.0.mixer.A_log", (32, 8), (32, 16))),
    "one direction": (random_weights(directions="none"), other("layers.0.mixer.A_b_log", "missing", (32, 16))),
    "no class token": (random_weights(class_token="none"), EMPTY),
    "patches": (random_weights(patch_size=16), other(CONV, (16, 3, 16, 16), (16, 3, 8, 8))),
    "channels": (random_weights(in_chans=1), other(CONV, (16, 1, 8, 8), (16, 3, 8, 8))),
    "transposed": (but(PROJ, WEIGHTS[PROJ].T), other(PROJ, (16, 64), (64, 16))),
    "flat": (but(PROJ, WEIGHTS[PROJ].flatten()), other(PROJ, (1024,), (64, 16))),
    "number": (but("cls_token", torch.tensor(1.0)), other("cls_token", (), (1, 1, 16))),
    "half": (dict(list(WEIGHTS.items())[::2]), other(TABLE, "missing", (1, 17, 16))),
    "one missing": (without(PROJ), other(PROJ, "missing", (64, 16))),
    "one more": (but("a", torch.ones(2)), other("a", (2,), "missing")),
    "another family's norm": (
        without(NORM) | {"norm.weight": WEIGHTS[NORM]},
        other(NORM, "missing", (16,)) + ", and 1 more",
    ),
    "another family's head": (but("distill_head.weight", torch.ones(2)), other("distill_head.weight", (2,), "missing")),
    "half prefixed": (prefixed("module.", without(HEAD)) | {HEAD: WEIGHTS[HEAD]}, EMPTY),
    "integers": (but(PROJ, WEIGHTS[PROJ].int()), f"has {PROJ} as torch.int32"),
    "complex": (but(PROJ, WEIGHTS[PROJ] + 1j), f"has {PROJ} as torch.complex64"),
    "sparse": (but(PROJ, WEIGHTS[PROJ].to_sparse()), "it calls 'torch._utils._rebuild_sparse_tensor'"),
    "meta": (but(PROJ, WEIGHTS[PROJ].to("meta")), "it calls 'torch._utils._rebuild_meta_tensor_no_storage'"),
    "expanded": (but(PROJ, torch.ones(1).expand(64, 16)), rf"has {PROJ} as .* tensor of shape \(64, 16\)"),
    "table of 7": (but(TABLE, TABLE4X4[:, :8]), other(TABLE, (1, 8, 16), (1, 17, 16))),
    "table of 0": (but(TABLE, TABLE4X4[:, :1]), other(TABLE, (1, 1, 16), (1, 17, 16))),
    "flat table": (but(TABLE, TABLE4X4[0]), other(TABLE, (17, 16), (1, 17, 16))),
    "two tables": (but(TABLE, torch.ones(2, 37, 16)), other(TABLE, (2, 37, 16), (1, 17, 16))),
}
WRONG_HEADS = {  # accepted by a model without a head
    "classes": (
        random_weights(num_classes=7),
        other(HEAD, (7, 16), (10, 16)) + ".*: num_classes must be the file's, or 0",
    ),
    "no head": (without(HEAD, BIAS), other(HEAD, "missing", (10, 16))),
    "no bias": (without(BIAS), other(BIAS, "missing", (10,))),
    "bias": (but(BIAS, torch.ones(7)), other(BIAS, (7,), (10,))),
    "nan in the head": (broken(HEAD, NAN), not_finite(HEAD, 1, 160)),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_HEADS])
def test_wrong_weights(name, tmp_path):
    content, message = {**WRONG, **WRONG_HEADS}[name]
    path = save(tmp_path / "weights.pth", content)
    assert_refused(path, message)
    if name in WRONG_HEADS:
        assert_weights(build(path, **FEATURES).model, {**WEIGHTS, **content}, but=[NORM, HEAD, BIAS])
        return
    with pytest.raises(UserError, match=message):
        build(path, **FEATURES)


def test_only_colours_are_adapted_to_other_channels(tmp_path):
    path = save(tmp_path / "weights.pth", random_weights(in_chans=1))
    with pytest.raises(UserError, match=other(CONV, (16, 1, 8, 8), (16, 4, 8, 8))):
        build(path, in_chans=4)


@pytest.mark.parametrize("shape", [(), (10,), (10, 16, 1), (10**9, 0)], ids=str)
def test_a_head_that_is_no_matrix(shape, tmp_path):
    path = save(tmp_path / "weights.pth", but(HEAD, torch.ones(shape)))
    message = re.escape(f"{HEAD} is {shape} there and (classes, features) in the model")
    assert_refused(path, message)
    with pytest.raises(UserError, match=message):
        load_published("test_vim", path)


FILES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 28640000\n",
    "json": b'{"model": {"cls_token": [1.0]}}',
    "zeros": bytes(1000),
    **{f"{part} thousandths": part for part in (1, 300, 900, 999)},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_checkpoint(name, suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    save(path, WEIGHTS) if suffix == "pth" else safetensors.torch.save_file(WEIGHTS, path)
    whole, content = path.read_bytes(), FILES[name]
    path.write_bytes(whole[: len(whole) * content // 1000] if isinstance(content, int) else content)
    assert_refused(path, "cannot read .* as a checkpoint: ")


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.pth", tmp_path / "nothing.safetensors"):
        assert_refused(path, f"no such checkpoint: {re.escape(str(path))}$")
