"""Checkpoints in which a trainer has logged values of numpy beside the weights, as mmengine does."""

import numpy as np
import pytest
import timm
import torch

import vim.checkpoints
from tests.test_hostile_checkpoints import archive, pickled
from tests.weight_files import WEIGHTS, Call, assert_refused, assert_weights, build, save

BEST = np.float64(81.3)
VALUES = {
    "scalar": BEST,
    "bool": np.bool_(True),
    "array": np.arange(1000.0),
    "empty array": np.zeros(0),
    "strings": np.array(["a", "bcd"]),
    "objects": np.array([1, "a", None, BEST], dtype=object),
    "records": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "type": np.dtype("float32"),
    "key": {np.int64(3): 1},
    "bytes": b"\xff\x00a" * 100,
}


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
@pytest.mark.parametrize("name", VALUES)
def test_values_of_numpy(name, core, tmp_path):
    path = tmp_path / "weights.pth"
    pickle = pickled({"best": VALUES[name]})
    path.write_bytes(archive(pickle.replace(b"numpy._core.", core).replace(b"numpy.core.", core)))
    assert vim.checkpoints.read_checkpoint(path).keys() == {"best"}
    assert_weights(build(save(path, {"model": WEIGHTS, "best": VALUES[name]})), WEIGHTS)


def test_a_file_of_mmengine(tmp_path, caplog):
    logging = pytest.importorskip("mmengine.logging")
    hub = logging.MessageHub("run")
    for step in range(1000):
        hub.update_scalar("train/loss", 1 / (step + 1))
    hub.update_info("best", BEST)
    model = timm.create_model("test_vmamba")
    weights = {f"backbone.{key}": value for key, value in model.state_dict().items() if not key.startswith("head.")}
    others = dict.fromkeys(["backbone.outnorm0.weight", "neck.conv.weight", "bbox_head.weight"], torch.ones(3))
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    rest = {"meta": {"epoch": 12, "best": BEST}, "optimizer": optimizer, "message_hub": hub.state_dict()}
    path = save(tmp_path / "a.pth", {**rest, "state_dict": weights | others, "param_schedulers": [{"last_step": 3}]})
    features = timm.create_model(
        "test_vmamba", features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    assert "besides its backbone are left out" in caplog.text
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().forward_intermediates(image, intermediates_only=True)
        for got, want in zip(features.eval()(image), expected, strict=True):
            torch.testing.assert_close(got, want)


RECONSTRUCT = BEST.reshape(1).__reduce__()[0]
STATE = {"__class__": 1, "__setstate__": 1, "keys": 1}


@pytest.mark.parametrize(
    "call",
    [
        Call(RECONSTRUCT, np.ndarray, (10**15,), b"b"),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (10**15,), np.dtype("f8"), False, b"")),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=STATE),
        Call(np.ndarray, (10**15,)),
    ],
)
def test_no_array_is_made(call, tmp_path):
    path = save(tmp_path / "weights.pth", {"model": WEIGHTS, "a": call})
    value = vim.checkpoints.read_checkpoint(path)["a"]
    assert isinstance(value, vim.checkpoints._Unread)
    assert not vars(value)
    assert_weights(build(path), WEIGHTS)


def test_a_value_of_numpy_is_no_weight(tmp_path):
    for value, kind in {BEST: "numpy scalar", VALUES["array"].tobytes(): "bytes"}.items():
        path = save(tmp_path / "weights.pth", WEIGHTS | {"a": value})
        assert_refused(path, f"holds no state dict: a is a {kind}, not a tensor")
    assert_refused(save(path, WEIGHTS | {"a": VALUES["array"]}), "holds no state dict: a is a ndarray, not a tensor")
