"""What the contract takes from timm's private modules, name by name, and what it promises of each family.

A name that a release of timm removes fails as vim is imported. A name that it changes fails here, under that name.
"""

import ast
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_model_args, get_model_input_config

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "vim/layers/contract.py"


def private_names(path):
    """The names a file imports from modules of timm's whose names start with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm.") and "._" in node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls_of_feature_take_indices(function):
    assert function(5) == ([0, 1, 2, 3, 4], 4)
    assert function(5, 2) == ([3, 4], 4)
    assert function(5, [-4, 0]) == ([1, 0], 1)
    with pytest.raises(AssertionError):
        function(5, [5])
    torch.jit.script(function)


def calls_of_feature_getter_net(kind):
    model = torch.nn.Identity()
    model.feature_info = [{"module": "a", "num_chs": 3, "reduction": 2}]
    model.forward_intermediates = lambda x, indices, norm, output_fmt, intermediates_only: [x, list(indices)]
    model.prune_intermediate_layers = lambda indices, prune_norm: [0]
    wrapper = kind(model, out_indices=(0,))
    assert wrapper.model is model
    assert wrapper(1) == [1, [0]]


def calls_of_update_model_args(function):
    model = timm.create_model("test_resnet")
    function(model, num_frames=3)
    assert get_model_args(model)["num_frames"] == 3


def calls_of_update_model_input_size(function):
    model = timm.create_model("test_vit")
    function(model, (96, 64))
    assert get_model_input_config(model)["input_size"] == (3, 96, 64)
    assert get_model_args(model)["img_size"] == (96, 64)
    assert list(inspect.signature(function).parameters)[:2] == ["model", "img_size"]


PRIVATE = {
    "timm.models._features.feature_take_indices": calls_of_feature_take_indices,
    "timm.models._features.FeatureGetterNet": calls_of_feature_getter_net,
    "timm.models._input.update_model_args": calls_of_update_model_args,
    "timm.models._input.update_model_input_size": calls_of_update_model_input_size,
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_name(name):
    module, _, attribute = name.rpartition(".")
    PRIVATE[name](getattr(importlib.import_module(module), attribute))


def test_each_private_name_has_a_test():
    assert set(private_names(CONTRACT)) == set(PRIVATE)


def test_no_other_file_imports_private_names_of_models():
    for room in ("vim", "models", "kernels", "tools"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.samefile(CONTRACT):
                assert not [name for name in private_names(path) if "timm.models." in name], path


# What the contract promises of each family


@pytest.fixture(params=["test_vim", "test_vim2", "test_videomamba"])
def name(request):
    import vim  # noqa: F401  registers the models

    return request.param


@pytest.mark.parametrize("options", [{}, {"img_size": (32, 64), "in_chans": 1}], ids=str)
def test_the_input_is_what_timm_records(name, options):
    model = timm.create_model(name, **options)
    assert (model.in_chans, *model.img_size) == (options.get("in_chans", 3), *options.get("img_size", (64, 64)))
    assert get_model_input_config(model)["input_size"] == (model.in_chans, *model.img_size)
    model.set_input_size(96)
    assert model.img_size == (96, 96)
    assert get_model_input_config(model)["input_size"] == (model.in_chans, 96, 96)
    assert model.num_frames is None
    with pytest.raises(ValueError, match="img_size must be at least the patch size"):
        model.set_input_size((2, 96))
    assert model.img_size == (96, 96)
    least = 4 if name == "test_vim2" else 16
    model.set_input_size(least)
    assert model.img_size == (least, least)
    assert model(torch.zeros(1, model.in_chans, least, least)).shape == (1, 1000)


def test_frames_of_clips(name):
    if name == "test_videomamba":
        assert timm.create_model(name, num_frames=3).num_frames == 3


def test_pruning_drops_what_no_longer_fits(name):
    model = timm.create_model(name)
    blocks = model.stages if name == "test_vim2" else model.layers
    width, indices = model.num_features, [0, 1]
    assert model.prune_intermediate_layers(indices, prune_head=False) == indices
    assert len(model.stages if name == "test_vim2" else model.layers) == 2 < len(blocks)
    if name == "test_vim2":  # narrower: the norm and the head go too
        assert (model.num_features, model.head_hidden_size, model.embed_dim, model.num_classes) == (24, 24, 24, 0)
        assert isinstance(model.norm_f, torch.nn.Identity) and isinstance(model.head, torch.nn.Identity)
    else:
        assert (model.num_features, model.num_classes) == (width, 1000)
        assert model.forward(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        model.prune_intermediate_layers(1, prune_norm=True)
        assert isinstance(model.norm_f, torch.nn.Identity) and model.num_classes == 0


def test_stopping_early(name):
    """The same map, the blocks after it left out, and a final norm only if it fits."""
    torch.manual_seed(0)
    model, image, calls = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64), []
    blocks = model.stages if name == "test_vim2" else model.layers
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(out))
    want = model.forward_intermediates(image, indices=[1], intermediates_only=True)[0]
    assert len(calls) == len(blocks)
    calls.clear()
    features, maps = model.forward_intermediates(image, indices=[1], stop_early=True)
    assert len(calls) == 2
    assert torch.equal(maps[0], want)
    assert torch.equal(features, want if name == "test_vim2" else model.norm_f(calls[1]))


def test_the_final_norm_follows_the_last_block_only(name):
    torch.manual_seed(0)
    model, image = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    plain, normed = (model.forward_intermediates(image, norm=norm, intermediates_only=True) for norm in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], normed[:-1], strict=True))
    assert (plain[-1] - normed[-1]).abs().max() > 0.1


def test_maps_have_the_models_precision(name):
    """Although the residual stream is float32."""
    model = timm.create_model(name, dtype=torch.bfloat16).eval()
    features, maps = model.forward_intermediates(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    assert {features.dtype, *(x.dtype for x in maps)} == {torch.bfloat16}


def test_a_new_head_keeps_the_mode_and_the_precision(name):
    model = timm.create_model(name, dtype=torch.float64).eval()
    model.reset_classifier(7, "max")
    assert (model.head.out_features, model.head.weight.dtype, model.head.training) == (7, torch.float64, False)
    assert (model.num_classes, model.global_pool) == (7, "max") and model.get_classifier() is model.head
    with pytest.raises(AssertionError, match="global_pool must be one of .*, got 'mean'"):
        model.reset_classifier(7, "mean")


def test_a_class_token_must_be_there_to_be_pooled():
    import vim  # noqa: F401  registers the models

    with pytest.raises(AssertionError, match="global_pool='token' needs a class token"):
        timm.create_model("test_vim2", global_pool="token")


def test_the_head_starts_small(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()


def test_checkpointing_reaches_every_block(name, monkeypatch):
    import vim.layers.backbone
    import vim.layers.weighted_averaging

    calls = []
    for module in (vim.layers.backbone, vim.layers.weighted_averaging):
        real = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda *args, real=real: calls.append(1) or real(*args))
    model = timm.create_model(name)
    layers = [layer for stage in model.stages for layer in stage.layers] if name == "test_vim2" else model.layers
    for enable, count in ((True, len(layers)), (False, 0)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(torch.zeros(1, 3, 64, 64))
        assert len(calls) == count
    features = timm.create_model(name, features_only=True)
    features.set_grad_checkpointing()
    features(torch.zeros(1, 3, 64, 64))
    assert calls


# Registration


def test_variants_are_functions_of_their_module(name):
    family = name.removeprefix("test_")
    variants = [variant for variant in timm.list_models(f"{family}_*") if "." not in variant]
    for variant in [*variants, name]:
        entrypoint = timm.model_entrypoint(variant)
        assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
        assert entrypoint.__name__ == entrypoint.__qualname__ == variant
        assert entrypoint.__doc__.endswith(".")
        module = entrypoint.__module__.rpartition(".")[2]
        assert entrypoint.__module__ == f"vim.models.{module}" and variant in timm.list_models(module=module)
    assert len(variants) == {"vim": 6, "vim2": 3, "videomamba": 16}[family]


def test_a_variants_options_give_way_to_the_users():
    import vim  # noqa: F401  registers the models

    model = timm.create_model("videomamba_tiny_f8", device="meta", depth=1, num_frames=4)
    assert (model.num_features, len(model.layers), model.num_frames) == (192, 1, 4)
    entrypoint = timm.model_entrypoint("videomamba_middle_f64")
    want = "VideoMamba-Middle on clips of 64 frames, 74 M parameters, 82.8 % Kinetics-400 top-1 published."
    assert entrypoint.__doc__ == want


# The ways out that timm tests


def test_fx_traces_every_family(name):
    from timm.models import FeatureGraphNet

    torch.manual_seed(0)
    model, image = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    block = "stages.1" if name == "test_vim2" else "layers.1"
    model.feature_info = [{"module": block, "num_chs": 1, "reduction": 1}]
    traced = FeatureGraphNet(model, out_indices=(0,)).eval()
    maps = {}
    model.get_submodule(block).register_forward_hook(lambda module, args, out: maps.update(want=out))
    model(image)
    torch.testing.assert_close(traced(image)[0], maps["want"])


def test_timm_finds_the_filter_beside_the_class(name):
    model = timm.create_model(name, num_classes=0)
    weights = importlib.import_module(type(model).__module__).checkpoint_filter_fn(model.state_dict(), model)
    assert weights.keys() == model.state_dict().keys()
