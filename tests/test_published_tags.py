import functools
import urllib.error

import pytest
import safetensors.torch
import timm
import torch

import vim.checkpoints
from tests.weight_files import (
    assert_weights,
    published,
    save,
)
from vim.engine.weights import save_for_timm
from vim.errors import UserError

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


GITHUB = "https://github.com/MzeroMiko/VMamba/releases/download/%23"
VSSD = "YuhengSSS/VSSD"
NVIDIA = "nvidia/MambaVision-"
FILES = {  # of a tag: the request, then pixels, crop_pct and crop_mode
    "vmamba_tiny_v0.in1k": (f"{GITHUB}v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 224, 0.875, "center"),
    "vmamba_small_v0.in1k": (f"{GITHUB}v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 224, 0.875, "center"),
    "vmamba_base_v0.in1k": (f"{GITHUB}v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 224, 0.875, "center"),
    "vmamba_tiny_s2l5.in1k": (f"{GITHUB}v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 224, 0.875, "center"),
    "vmamba_small_s2l15.in1k": (f"{GITHUB}v2cls/vssm_small_0229_ckpt_epoch_222.pth", 224, 0.875, "center"),
    "vmamba_base_s2l15.in1k": (f"{GITHUB}v2cls/vssm_base_0229_ckpt_epoch_237.pth", 224, 0.875, "center"),
    "vmamba_tiny_s1l8.in1k": (f"{GITHUB}v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 224, 0.875, "center"),
    "vmamba_small_s1l20.in1k": (f"{GITHUB}v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 224, 0.875, "center"),
    "vmamba_base_s1l20.in1k": (f"{GITHUB}v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 224, 0.875, "center"),
    **{
        f"mambar_{size}.wangf3014_in1k": ("Wangf3014/Mamba-Reg", f"mambar_{size}_patch16_224.pth", 224, 1.0, "center")
        for size in ("small", "base", "large")
    },
    "vssd_micro.in1k": (VSSD, "vssd_micro_best.pth", 224, 0.875, "center"),
    **{
        f"vssd_{size}.{tag}": (VSSD, f"vssd_{size}_{file}.pth", 224, 0.875, "center")
        for size in ("tiny", "small", "base")
        for tag, file in (("in1k", "best_ema"), ("mesa_in1k", "e300_with_mesa"))
    },
    "mambavision_t.nvidia_in1k": (f"{NVIDIA}T-1K", "model.safetensors", 224, 1.0, "center"),
    "mambavision_t2.nvidia_in1k": (f"{NVIDIA}T2-1K", "mambavision_tiny2_1k.pth.tar", 224, 0.98, "center"),
    "mambavision_s.nvidia_in1k": (f"{NVIDIA}S-1K", "mambavision_small_1k.pth.tar", 224, 0.93, "center"),
    "mambavision_b.nvidia_in1k": (f"{NVIDIA}B-1K", "mambavision_base_1k.pth.tar", 224, 1.0, "center"),
    "mambavision_b.nvidia_in21k_ft_in1k": (f"{NVIDIA}B-21K", "mambavision_base_21k.pth.tar", 224, 1.0, "center"),
    "mambavision_l.nvidia_in1k": (f"{NVIDIA}L-1K", "mambavision_large_1k.pth.tar", 224, 1.0, "center"),
    "mambavision_l.nvidia_in21k_ft_in1k": (f"{NVIDIA}L-21K", "mambavision_large_21k.pth.tar", 224, 1.0, "center"),
    "mambavision_l2.nvidia_in1k": (f"{NVIDIA}L2-1K", "mambavision_large2_1k.pth.tar", 224, 1.0, "center"),
    "mambavision_l2_512.nvidia_in21k_ft_in1k": (
        *(f"{NVIDIA}L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar"),
        *(512, 0.93, "squash"),
    ),
    "mambavision_l3.nvidia_in21k_ft_in1k": (
        *(f"{NVIDIA}L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar"),
        *(256, 1.0, "center"),
    ),
    "mambavision_l3_512.nvidia_in21k_ft_in1k": (
        *(f"{NVIDIA}L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar"),
        *(512, 0.93, "squash"),
    ),
}
SMALL = {  # of a family
    "vmamba": {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1)},
    "vssd": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "mambar": {"embed_dim": 16, "depth": 1},
    "mambavision": {"stem_dim": 8, "embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1)},
}


def test_every_tag_with_weights_is_here():
    names = [f"{family}*" for family in SMALL]
    assert set(timm.list_models(names, pretrained=True)) == FILES.keys()


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """Downloads that put what is in `content` where timm looks for the file."""
    asked, content = [], {}

    def download(*words, **options):
        asked.append(words)
        path = tmp_path / words[-1].rpartition("/")[2]
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(content, path)
        else:
            save(path, {"model": content})
        return str(path)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda name, filename, **_: download(name, filename))
    monkeypatch.setattr("timm.models._builder.download_cached_file", download)
    monkeypatch.setattr("torch.load", functools.partial(refuse_unsafe, torch.load))
    return asked, content


def refuse_unsafe(load, *words, weights_only, **options):
    assert weights_only
    return load(*words, weights_only=True, **options)


@pytest.mark.parametrize("name", FILES)
def test_what_a_tag_downloads(name, requests, caplog):
    asked, content = requests
    *request, pixels, crop_pct, crop_mode = FILES[name]
    build = functools.partial(timm.create_model, name, **SMALL[name.partition("_")[0]])
    content |= build().state_dict()
    assert asked == []
    vim.checkpoints._note_licence.cache_clear()
    model, _ = build(pretrained=True), build(pretrained=True)
    assert asked == [tuple(request)] * 2
    assert_weights(model, content)
    data = timm.data.resolve_model_data_config(model)
    assert data == {
        "input_size": (3, pixels, pixels),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    note = "of https://github.com/NVlabs/MambaVision are for non-commercial use only: their licence is cc-by-nc-sa-4.0"
    assert caplog.text.count(note) == name.startswith("mambavision")


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8.in1k", "mambavision_t.nvidia_in1k"])
def test_a_download_that_fails(name, monkeypatch):
    def fail(*words, **options):
        raise urllib.error.URLError("Name or service not known. Try again")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setattr("timm.models._hub.download_url_to_file", fail)
    repository, *file = FILES[name][:-3]
    url = f"https://huggingface.co/{repository}/resolve/main/{file[0]}" if file else repository
    with pytest.raises(UserError) as caught:
        timm.create_model(name, pretrained=True, **SMALL[name.partition("_")[0]])
    assert str(caught.value).startswith(f"cannot download {url}: <urlopen error Name or service not known; ")
    assert str(caught.value).endswith('pass pretrained_cfg_overlay={"file": PATH}')


def test_a_licence_is_not_noted_for_a_folder_of_ones_own(tmp_path, caplog):
    vim.checkpoints._note_licence.cache_clear()
    model = timm.create_model("mambavision_t", **SMALL["mambavision"])
    save_for_timm(model, tmp_path, None, {})
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "non-commercial" not in caplog.text
    model.load_pretrained(str(save(tmp_path / "a.pth", model.state_dict())))
    assert "non-commercial" in caplog.text
