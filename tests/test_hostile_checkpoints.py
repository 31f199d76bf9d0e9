import argparse
import codecs
import contextlib
import functools
import io
import operator
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import vim.checkpoints
from tests.weight_files import (
    AVERAGE,
    CODE,
    EVAL,
    WEIGHTS,
    Call,
    assert_refused,
    assert_weights,
    build,
    published,
    save,
    saved,
)
from vim.errors import UserError

# What these files call would make a file called `made`


class Restored(OrderedDict):
    def __setstate__(self, state):
        Path("made").touch()


CALLS = {  # the name that is refused, and what calls it
    "os.system": ("posix.system", Call(os.system, "touch made")),
    "os.mkdir": ("posix.mkdir", Call(os.mkdir, "made")),
    "subprocess": (r"\w+.check_call", Call(subprocess.check_call, ["touch", "made"])),
    "eval": ("__builtin__.eval", EVAL),
    "exec": ("__builtin__.exec", Call(exec, CODE)),
    "open": ("io.open", Call(open, "made", "w")),
    "getattr": (r"pathlib\.\w+", Call(Call(getattr, Path("made"), "touch"))),
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


# bytes as numpy's arrays have them: the function and a long string, in the memo, called once and again
ENCODE = b"\x80\x02}X\1\0\0\0a](c_codecs\nencode\nq\x01X\x20\0\0\0" + b"x" * 32 + b"q\x02X\6\0\0\0latin1q\x03\x86R"
AGAIN = b"h\x01h\x02h\x03\x86R"
ONE_HASH = b"".join(b"\x8a\x0a" + (i * sys.hash_info.modulus).to_bytes(10, "little") + b"N" for i in range(3000))
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
    "codec, again": (archive(ENCODE + AGAIN * 100 + b"es."), "it calls '_codecs.encode'"),
    "codec, from the memo": (archive(ENCODE + b"h\x01X\1\0\0\0aX\3\0\0\0hex\x86Res."), "it calls '_codecs.encode'"),
    "codec, kept": (archive(ENCODE + b"h\x01h\x01\x86es."), "it calls '_codecs.encode'"),
    "codec of a codec": (call(codecs.encode, Call(codecs.encode, "a", "latin1"), "hex"), "it calls '_codecs.encode'"),
    "names": (archive(b"\x80\x02](" + b"cnumpy\ndtype\n" * 2000 + b"e."), "more than 1000 names of functions"),
    "keys of one hash": (archive(b"\x80\x02}(" + ONE_HASH + b"u."), "more than 2000 long integers"),
    "called result": (archive(b"\x80\x02}X\1\0\0\0acnumpy\ndtype\n)R)Rs."), DAMAGED),
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


def test_a_path_that_is_no_utf8(tmp_path):
    path = tmp_path / "\udcfe.pth"
    torch.save({"a": torch.ones(1)}, path.open("wb"))
    assert torch.equal(vim.checkpoints.read_checkpoint(path)["a"], torch.ones(1))


def test_many_values_besides_the_tensors(tmp_path):
    torch.save({"a": torch.zeros(1), "history": [0] * 600_000}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth is not a checkpoint: it holds more than 500000 opcodes"):
        vim.checkpoints.read_checkpoint(tmp_path / "a.pth")


# Options of yacs, which most training code keeps in its checkpoints


class CfgNode(dict):
    """Pickled, it is what yacs's own class is."""

    __module__ = "yacs.config"

    def __init__(self, entries, **attributes):
        super().__init__(entries)
        self.__dict__.update(attributes)


YACS = {"__immutable__": False, "__deprecated_keys__": set(), "__renamed_keys__": {}, "__new_allowed__": False}


@pytest.fixture
def yacs(monkeypatch):
    """A module under the name of yacs to pickle from, and not to read with."""
    module = types.ModuleType("yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    module.CfgNode = CfgNode

    def write(path, content):
        save(path, content)
        monkeypatch.delitem(sys.modules, "yacs.config")
        return path

    return write


def test_options_of_yacs(yacs, tmp_path):
    options = CfgNode({"MODEL": CfgNode({"DIMS": [96], "NAME": "vssm"}, **YACS), "AMP": True}, **YACS)
    path = yacs(tmp_path / "a.pth", {**published(WEIGHTS, AVERAGE), "config": options})
    read = vim.checkpoints.read_checkpoint(path)["config"]
    assert read == {"MODEL": {"DIMS": [96], "NAME": "vssm"}, "AMP": True}
    assert not vars(read)
    assert not vars(read["MODEL"])
    assert_weights(build(path), WEIGHTS)


HIDING = dict.fromkeys(["get", "items", "keys", "values", "update", "pop", "__iter__", "__class__"], 1)


def test_attributes_of_dicts_hide_no_methods(yacs, tmp_path):
    hidden = Call(OrderedDict, [list(pair) for pair in WEIGHTS.items()], state=HIDING)
    outer = Call(CfgNode, {"model": hidden}, state=HIDING)
    wrapped = {"state_dict": outer, "more": [(outer,)], "count": Counter("aab")}
    wrapped["itself"] = wrapped
    assert_weights(build(yacs(tmp_path / "a.pth", wrapped)), WEIGHTS)


def test_options_of_yacs_within_one_another(tmp_path):
    start = b"cyacs.config\nCfgNode\nq\x01)\x81"
    levels = b"".join([b"X\x01\x00\x00\x00a", b"h\x01)\x81"] * 90_000) + b"s" * 90_000
    (tmp_path / "a.pth").write_bytes(archive(b"\x80\x02" + start + levels + b"."))
    assert_refused(tmp_path / "a.pth", "holds no state dict: a is a OrderedDict, not a tensor")


@pytest.mark.parametrize("name", ["yacs.config.Other", "yacs.config.CfgNode.load_cfg", "other.config.CfgNode"])
def test_other_names_of_yacs_are_refused(name, tmp_path):
    module, _, leaf = name.rpartition(".")
    (tmp_path / "a.pth").write_bytes(archive(f"\x80\x02}}X\1\0\0\0ac{module}\n{leaf}\n)\x81s.".encode("latin1")))
    assert_refused(tmp_path / "a.pth", f"it calls '{name}'")
