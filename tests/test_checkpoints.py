import argparse
import codecs
import contextlib
import functools
import io
import json
import operator
import os
import pickle
import re
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import vim.checkpoints
from vim.engine.weights import load_published, save_for_timm
from vim.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 10}
TABLE, CONV, PROJ = "pos_embed", "patch_embed.proj.weight", "layers.1.mixer.in_proj.weight"
HEAD, BIAS, NORM = "head.weight", "head.bias", "norm_f.weight"
FEATURES = {"features_only": True, "out_indices": (0, 1), "num_classes": None}


def build(path=None, *, name="test_vim", overlay=None, **changes):
    """A tiny model of ten classes, with the weights in a file where one is named."""
    overlay = {"num_classes": 10, **({"file": str(path)} if path else {}), **(overlay or {})}
    return timm.create_model(name, pretrained=bool(path), pretrained_cfg_overlay=overlay, **{**TINY, **changes})


def random_weights(seed=0, **changes):
    """Of eighths, so that any floating-point type holds them."""
    torch.manual_seed(seed)
    return {key: torch.randint(-8, 9, value.shape) / 8 for key, value in build(**changes).state_dict().items()}


WEIGHTS, AVERAGE = random_weights(), random_weights(1)


def published(weights, average):
    """The layout of the authors' files."""
    options = argparse.Namespace(lr=1e-3, model="vim", distributed=True, device=torch.device("cpu"))
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.95)}]}
    rest = {"optimizer": optimizer, "lr_scheduler": {"lr": 1e-3}, "epoch": 299, "scaler": {"scale": 65536.0}}
    return {"model": weights, "model_ema": average, "args": options, **rest}


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_weights(model, weights, but=()):
    state = model.state_dict()
    assert state.keys() - set(but) == weights.keys() - set(but)
    assert all(torch.equal(state[key], weights[key]) for key in state.keys() - set(but))


def assert_refused(path, message):
    """By each way from a file to a model; nothing of it is loaded."""
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (lambda: vim.checkpoints.load_pretrained(model, path), lambda: build(path)):
        with pytest.raises(UserError) as caught:
            load()
        line = str(caught.value)
        assert re.search(message, line), line
        assert str(path) in line
        assert len(line.splitlines()) == 1
        assert "weights_only=False" not in line and "False" not in line
    assert_weights(model, before)


def without(*keys):
    return {key: value for key, value in WEIGHTS.items() if key not in keys}


def prefixed(prefix, weights=WEIGHTS):
    return {f"{prefix}{key}": value for key, value in weights.items()}


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


TAGS = {
    "vim_tiny": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_stride8": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    "vim_small_stride8": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base": ("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
}


@pytest.mark.parametrize("name", TAGS)
def test_published_tags(name, tmp_path, monkeypatch):
    def create(pretrained):
        return timm.create_model(f"{name}.hustvl_in1k", pretrained=pretrained, embed_dim=16, depth=1)

    weights, other = create(False).state_dict(), create(False).state_dict()
    path, asked = save(tmp_path / "weights.pth", published(weights, other)), []
    download = lambda repository, filename, **options: asked.append((repository, filename)) or str(path)  # noqa: E731
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = create(True)
    assert asked == [TAGS[name]]
    assert_weights(model, weights)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save(path, {"model": weights | {"cls_token": torch.ones(1, 1, 8)}})
    with pytest.raises(UserError, match=r"cls_token is \(1, 1, 8\) there and \(1, 1, 16\) in the model"):
        create(True)


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


# Hostile files: what they call would make a file called `made`


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """It may be what is called."""


class Restored(OrderedDict):
    def __setstate__(self, state):
        Path("made").touch()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


CODE = "open('made', 'w')"
EVAL = Call(eval, CODE)
CALLS = {  # the name that is refused, and what calls it
    "os.system": ("posix.system", Call(os.system, "touch made")),
    "os.mkdir": ("posix.mkdir", Call(os.mkdir, "made")),
    "subprocess": (r"\w+.check_call", Call(subprocess.check_call, ["touch", "made"])),
    "eval": ("__builtin__.eval", EVAL),
    "exec": ("__builtin__.exec", Call(exec, CODE)),
    "open": ("io.open", Call(open, "made", "w")),
    "getattr": ("__builtin__.getattr", Call(Call(getattr, Path("made"), "touch"))),
    "methodcaller": ("operator.methodcaller", Call(operator.methodcaller("touch"), Path("made"))),
    "partial": ("functools.partial", Call(functools.partial(eval, CODE))),
    "map": ("__builtin__.list", Call(list, Call(map, eval, [CODE]))),
    "torch.hub": ("functools.partial", Call(functools.partial(torch.hub.load, ".", "a", source="local"))),
    "torch.load": ("functools.partial", Call(functools.partial(torch.load, "calls.pth", weights_only=False))),
    "numpy.load": (r"numpy[\w.]*.load", Call(np.load, "calls.npy", None, True)),
    "pickle.loads": ("pickle.loads", Call(pickle.loads, pickle.dumps(EVAL))),
    "storage": ("torch.storage._load_from_bytes", Call(torch.storage._load_from_bytes, saved(EVAL))),
    "state": (r"[\w.]+.Restored", Call(Restored, state={"a": 1})),
    "options": ("__builtin__.eval", argparse.Namespace(lr=1, hook=EVAL)),
    "key": ("__builtin__.eval", {EVAL: 1}),
    "parameter": ("__builtin__.eval", Call(torch._utils._rebuild_parameter, EVAL, True, OrderedDict())),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("name", CALLS)
def test_what_a_file_calls_is_not_run(name, folder):
    called, call = CALLS[name]
    Path("hubconf.py").write_text(f"def a(): {CODE}")
    save("calls.pth", EVAL)
    np.save("calls.npy", np.array([EVAL], dtype=object))
    before, path, content = set(folder.iterdir()), folder.parent / "weights.pth", {"model": {"a": call}}
    save(path, content)
    assert_refused(path, f"it calls '{called}', .*; nothing of it was run")
    assert set(folder.iterdir()) == before
    with contextlib.suppress(Exception):  # it was no empty threat
        torch.load(path, weights_only=False)
    assert Path("made").exists()


# Hostile files that call nothing


class Storage:
    """Pickled, it is the storage of a tensor in a checkpoint."""

    def __init__(self, numbers=4, key="0"):
        self.numbers, self.key = numbers, key


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.numbers, *self.view)


def pickled(content, *view):
    buffer = io.BytesIO()
    pickler = Pickler(buffer, 2)
    pickler.view = view
    pickler.dump(content)
    return buffer.getvalue()


NUMBERS = np.arange(4, dtype=np.float32).tobytes()
LINK = zipfile.ZipInfo("a/data.pkl")
LINK.create_system, LINK.external_attr = 3, 0o120777 << 16


def archive(data, *members, name="a/data.pkl", compression=zipfile.ZIP_STORED, repeat=1):
    """A file like torch's: a pickle, four numbers and what else is named."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for member, content in ((name, data), ("a/version", b"3"), ("a/data/0", NUMBERS), *members):
            file.writestr(member, content)
        file.filelist *= repeat  # entries that share their bytes
    return buffer.getvalue()


def of(offset=0, size=(4,), stride=(1,), **storage):
    """A file of one tensor."""
    return archive(pickled({"a": tensor(offset, size, stride, **storage)}))


def tensor(offset=0, size=(4,), stride=(1,), **storage):
    return Call(torch._utils._rebuild_tensor_v2, Storage(**storage), offset, size, stride, False, OrderedDict())


def call(*words):
    return archive(pickled({"a": Call(*words)}))


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), buffer)
    return buffer.getvalue()


def header(shape="[1]", offsets="[0,4]", size=None):
    """A safetensors file of one number."""
    text = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(4)


NO_ARCHIVE = "expected safetensors, or what torch.save writes since PyTorch 1.6"
DAMAGED = "cannot read .* as a checkpoint: it is damaged, or not what safetensors or torch.save wrote "
CPU_TENSOR = torch._utils._rebuild_device_tensor_from_cpu_tensor
ATTACKS = {
    "offset before": (of(offset=-1), "invalid storage offset"),
    "offset behind": (of(offset=2), "not resizable"),
    "large offset": (of(offset=2**61), "overflow"),
    "large size": (of(size=(10**9,)), "not resizable"),
    "negative size": (of(size=(-4,)), "overflow"),
    "large stride": (of(stride=(10**9,)), "not resizable"),
    "negative stride": (of(offset=3, stride=(-1,)), "overflow"),
    "large storage": (of(numbers=10**9), "does not match expected size"),
    "negative storage": (of(numbers=-4), DAMAGED),
    "storage elsewhere": (of(key="../../../etc/hostname"), "file not found"),
    "storage of a list": (of(numbers=[[4] * 4] * 4), DAMAGED),
    "expanded": (saved({"a": torch.zeros(1).expand(10**12)}), "has a as torch.float32.* expected all numbers"),
    "parent folder": (archive(pickled({}), ("../../made", b"")), "not in a subdirectory"),
    "root folder": (archive(pickled({}), ("/made", b"")), "not in a subdirectory"),
    "bomb": (archive(bytes(10**7), compression=zipfile.ZIP_DEFLATED), "its .* bytes would unpack to 100000"),
    "overlapping": (archive(bytes(1000), repeat=20), "its .* bytes would unpack to 2"),
    "cut": (of().replace(NUMBERS, NUMBERS[:8]), DAMAGED),
    "flipped": (of().replace(NUMBERS, NUMBERS[::-1]), "a/data/0 in it does not match its checksum"),
    "link": (archive(b"/etc/hostname", name=LINK), "opcode b'/' unknown"),
    "no pickle": (archive(b"", name="a/b"), "failed locating file data.pkl"),
    "long string": (archive(b"\x80\x02}X\xff\xff\xff\xff"), "expected 4294967295 bytes"),
    "long number": (archive(b"\x80\x02}\x8b\xff\xff\xff\x7f"), "not enough data"),
    "deep": (archive(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."), "holds more than 100000 tuples"),
    "deep name": (archive(b"\x80\x02})" + b"\x85" * 10_000 + b"K\x01s."), "expected names of tensors, got a tuple"),
    "no function": (archive(b"\x80\x02}K\x01))\x81s."), DAMAGED),
    "bytearray": (call(bytearray, 10), "it calls '__builtin__.bytearray'"),
    "capitals": (archive(pickled(Call(bytearray, 10)), name="a/DATA.PKL"), "it calls '__builtin__.bytearray'"),
    "codec": (call(codecs.encode, "a", "hex"), "it calls '_codecs.encode'"),
    "empty tensor": (call(torch.Tensor, 10), "it calls 'torch.Tensor'"),
    "copied tensor": (
        call(CPU_TENSOR, tensor(stride=(0,)), torch.float64, "cpu", False),
        "_cpu_tensor'",
    ),
    "old": (saved(EVAL, _use_new_zipfile_serialization=False), NO_ARCHIVE),
    "old, then an archive": (saved({"a": 1}, _use_new_zipfile_serialization=False) + of(), NO_ARCHIVE),
    "pickle": (pickle.dumps(EVAL, 2), NO_ARCHIVE),
    "tar": (tar(), NO_ARCHIVE),
    "script": (script, r"it calls '__torch__.torch.nn.modules.linear.(___torch_mangle_\d+.)?Linear'"),
    "script without objects": (archive(pickled({}), ("a/constants.pkl", pickled(()))), "TorchScript archives"),
    "safetensors: a pickle": (pickle.dumps(EVAL), DAMAGED),
    "safetensors: a zip": (saved(EVAL), DAMAGED),
    "safetensors: huge header": (header(size=2**63), DAMAGED),
    "safetensors: long header": (header(size=10**6), DAMAGED),
    "safetensors: behind the end": (header("[100]", "[0,400]"), DAMAGED),
    "safetensors: before the start": (header(offsets="[-4,0]"), DAMAGED),
    "safetensors: another shape": (header("[100]"), DAMAGED),
    "safetensors: huge shape": (header(f"[{2**62},{2**62}]"), DAMAGED),
}


def test_what_the_attacks_bend_is_read(tmp_path):
    """So that it is the attack that is refused."""
    path, numbers = tmp_path / "a.pth", torch.arange(4.0)
    path.write_bytes(of())
    assert torch.equal(vim.checkpoints.read_checkpoint(path)["a"], numbers)
    path.with_suffix(".safetensors").write_bytes(header())
    assert torch.equal(vim.checkpoints.read_checkpoint(path.with_suffix(".safetensors"))["a"], torch.zeros(1))


@pytest.mark.filterwarnings("ignore")  # of torch.jit
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, folder):
    content, message = ATTACKS[name]
    path = folder.parent / ("weights.safetensors" if "safetensors" in name else "weights.pth")
    path.write_bytes(content() if callable(content) else content)
    assert_refused(path, message)
    assert {*folder.parent.iterdir(), *folder.iterdir()} == {path, folder}
    assert not Path("/made").exists()


# Wrong files


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
    "batch norm": ({"bn1.num_batches_tracked": torch.tensor(3)}, "has bn1.num_batches_tracked as torch.int64"),
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


# tools/convert.py


@pytest.fixture
def convert(call):
    """Run the tool here: its exit status, output and errors."""
    return functools.partial(call, "convert")


def test_convert(convert, tmp_path):
    raw, average = (timm.create_model("test_vim", num_classes=7).eval() for _ in range(2))
    path = save(tmp_path / "a.pth", published(raw.state_dict(), average.state_dict()))
    folder, image = tmp_path / "a folder", torch.randn(1, 3, 64, 64)
    for words, model in (((), raw), (("--ema",), average)):
        status, output, errors = convert(path, folder, "--model", "test_vim", *words)
        assert (status, errors) == (0, "")
        assert output == f'in {folder}: timm.create_model("local-dir:{folder}", pretrained=True)\n'
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image), model(image))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["test_vim", "test_videomamba", "test_vim2"])
def test_what_convert_writes_transformers_reads(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = (3, 4, 64, 64) if name == "test_videomamba" else (3, 64, 64)
    model = timm.create_model(name, num_classes=3, **({"num_frames": 4} if len(shape) == 4 else {})).eval()
    save_for_timm(model, tmp_path, ["cat", "dog", "owl"], {"crop_pct": 0.5})
    read, images = transformers.AutoModelForImageClassification.from_pretrained(tmp_path), torch.randn(2, *shape)
    assert torch.equal(read(images).logits, model(images))
    assert read.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        Image.new("RGB", (90, 70)), return_tensors="pt"
    )
    assert prepared["pixel_values"].shape == (1, 3, 64, 64)


def test_what_convert_writes_has_its_classes_once(tmp_path):
    """transformers passes those of the config and `model_args` to timm together."""
    save_for_timm(timm.create_model("test_vim", num_classes=3), tmp_path, None, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 3
    assert "num_classes" not in config["model_args"]


def test_convert_refuses(convert, folder):
    save("a.pth", {"model": WEIGHTS})
    save("b.pth", {"model": EVAL})
    for words, message in {
        "c.pth out --model test_vim": "no such checkpoint: c.pth",
        "a.pth out --model test_vim": r"a.pth is of another model: cls_token is \(1, 1, 16\) there and \(1, 1, 64\)",
        "a.pth out --model test_vim --ema": "a.pth holds no running average",
        "a.pth out --model resnet18": "resnet18 is timm's",
        "a.pth out --model vim_large": "no such model: vim_large \\(the closest: vim_base, vim2_base",
        "a.pth out --ema": "--ema goes with --model",
        "a.pth out": "a.pth is not a checkpoint of tools/train.py",
        "b.pth out --model test_vim": "b.pth as a checkpoint: it calls '__builtin__.eval'",
        "b.pth out": "b.pth as a checkpoint: it calls '__builtin__.eval'",
    }.items():
        status, output, errors = convert(*words.split())
        assert (status, output) == (2, "")
        assert re.fullmatch(f"error: .*{message}.*\n", errors), errors
    assert sorted(path.name for path in folder.iterdir()) == ["a.pth", "b.pth"]


def test_a_path_that_is_no_utf8(tmp_path):
    path = tmp_path / "\udcfe.pth"
    torch.save({"a": torch.ones(1)}, path.open("wb"))
    assert torch.equal(vim.checkpoints.read_checkpoint(path)["a"], torch.ones(1))


def test_many_values_besides_the_tensors(tmp_path):
    torch.save({"a": torch.zeros(1), "history": [0] * 3_000_000}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth is not a checkpoint: besides its tensors it holds \d+ bytes of values"):
        vim.checkpoints.read_checkpoint(tmp_path / "a.pth")
