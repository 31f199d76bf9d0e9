"""What the contract takes from timm's private modules, name by name, and what it promises of each family.

A name that a release of timm removes fails as vim is imported. A name that it changes fails here, under that name.
"""

import ast
import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.models import get_model_args, get_model_input_config
from timm.optim import param_groups_layer_decay
from torch.nn.attention import SDPBackend, sdpa_kernel

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


STAGED = ["test_vim2", "test_vmamba", "test_mambavision", "test_vssd", "test_convnext_s4nd"]


@pytest.fixture(
    params=[
        "test_vim",
        "test_vim_ssd",
        "test_vim_s4d",
        "test_vim_moe",
        "test_videomamba",
        "test_mambar",
        "test_s4nd",
        *STAGED,
    ]
)
def name(request):
    import vim  # noqa: F401  registers the models

    return request.param


def blocks_of(model):
    return model.stages if hasattr(model, "stages") else model.layers


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
    least = 4 if name in STAGED else 16
    model.set_input_size(least)
    assert model.img_size == (least, least)
    assert model.eval()(torch.zeros(1, model.in_chans, least, least)).shape == (1, 1000)


def test_frames_of_clips(name):
    if name == "test_videomamba":
        assert timm.create_model(name, num_frames=3).num_frames == 3


def test_pruning_drops_what_no_longer_fits(name):
    model = timm.create_model(name)
    blocks = blocks_of(model)
    width, indices = model.num_features, [0, 1]
    assert model.prune_intermediate_layers(indices, prune_head=False) == indices
    assert len(blocks_of(model)) == 2 < len(blocks)
    if name in STAGED:  # narrower: the norm and the head go too
        width = model.feature_info[1]["num_chs"]
        assert (model.num_features, model.head_hidden_size, model.embed_dim) == (width, width, width)
        assert model.num_classes == 0
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
    blocks = blocks_of(model)
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(out))
    want = model.forward_intermediates(image, indices=[1], intermediates_only=True)[0]
    assert len(calls) == len(blocks)
    calls.clear()
    features, maps = model.forward_intermediates(image, indices=[1], stop_early=True)
    assert len(calls) == 2
    assert torch.equal(maps[0], want)
    assert torch.equal(features, want if hasattr(model, "stages") else model.norm_f(calls[1]))


def test_the_final_norm_follows_the_last_block_only(name):
    torch.manual_seed(0)
    model, image = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    torch.nn.init.normal_(next(model.norm_f.parameters()))  # a batch norm that is new changes nothing
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
    import vim.layers.stages
    import vim.layers.weighted_averaging

    calls = []
    for module in (vim.layers.backbone, vim.layers.stages, vim.layers.weighted_averaging):
        real = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda *args, real=real: calls.append(1) or real(*args))
    model = timm.create_model(name)
    staged = hasattr(model, "stages")
    layers = [layer for stage in model.stages for layer in stage.layers] if staged else model.layers
    for enable, count in ((True, len(layers)), (False, 0)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(torch.zeros(1, 3, 64, 64))
        assert len(calls) == count
    features = timm.create_model(name, features_only=True)
    features.set_grad_checkpointing()
    features(torch.zeros(1, 3, 64, 64))
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(name, reentrant):
    """Batch norms see each image once, although their blocks run twice."""
    image, states = torch.randn(2, 3, 64, 64, requires_grad=True), []
    try:
        set_reentrant_ckpt(reentrant)
        for enable in (False, True):
            torch.manual_seed(0)
            model = timm.create_model(name, drop_path_rate=0.5)
            model.set_grad_checkpointing(enable)
            model(image).square().sum().backward()
            states.append({n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()))
    finally:
        set_reentrant_ckpt(False)
    torch.testing.assert_close(states[1], states[0])


def test_rates_fall_from_block_to_block(name):
    """From the head, whose rate is the optimizer's, to the stem; a stage's downsampling goes with its first block."""
    model = timm.create_model(name)
    names = {parameter: n for n, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scales = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales.keys() == set(names.values())
    blocks = [f"layers.{i}." for i in range(len(blocks_of(model)))]
    if hasattr(model, "stages"):
        blocks = [f"stages.{i}.layers.{j}." for i, stage in enumerate(model.stages) for j in range(len(stage.layers))]
    want = {block: 0.5 ** (len(blocks) - i) for i, block in enumerate(blocks)}
    want |= {f"stages.{i}.downsample.": want[f"stages.{i}.layers.0."] for i in range(4) if name in STAGED}
    want |= {"norm_f.": 0.5, **dict.fromkeys(("head.", "neck.", "norm_neck."), 1.0)}
    for parameter, scale in scales.items():
        stem = 0.5 ** (len(blocks) + 1)  # what has no other place: the patches' embedding, tokens, positions
        assert scale == next((want[start] for start in want if parameter.startswith(start)), stem), parameter


def test_feature_maps_of_any_size(name):
    padded = [*STAGED, "test_s4nd"]  # to whole patches, of any number
    options = {} if name in STAGED else {"out_indices": (0, 1, 2)}
    options |= {} if name in padded else {"dynamic_img_size": True}
    model = timm.create_model(name, features_only=True, **options).eval()
    strides = [4, 8, 16, 32] if name in STAGED else [16, 16, 16]
    assert model.feature_info.reduction() == strides
    for rows, columns in ((64, 96), (71, 45), (33, 16)):
        maps = model(torch.randn(1, 3, rows, columns))
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        for m, stride in zip(maps, strides, strict=True):
            if name in padded:  # rounded up
                assert m.shape[2:] == (-(-rows // stride), -(-columns // stride))
            else:
                assert m.shape[2:] == (rows // stride, columns // stride)
    last = timm.create_model(name, features_only=True, out_indices=(-1,))
    assert last.feature_info.reduction() == strides[-1:] and len(last(torch.randn(1, 3, 64, 64))) == 1


def test_a_changed_model_is_copied(name):
    torch.manual_seed(0)
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    for change in (lambda: model.reset_classifier(7, "max"), lambda: model.prune_intermediate_layers([0])):
        change()
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(copied(image), model(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_16_bits(name, dtype):
    torch.manual_seed(0)
    model, image = timm.create_model(name, drop_path_rate=0.1).train(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype):
        logits = model(image)
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    whole = model.eval()(image)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(image).float(), whole, rtol=0, atol=0.05 * whole.abs().max().item())
    torch.testing.assert_close(
        model.to(dtype)(image.to(dtype)).float(), whole, rtol=0, atol=0.05 * whole.abs().max().item()
    )


def test_derivatives_of_functions(name):
    """Forward mode and one gradient for each image agree with reverse mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, num_classes=2, dtype=torch.float64).eval()
    image, direction = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no forward mode
        _, slope = torch.func.jvp(lambda x: model(x).sum(), (image,), (direction,))
    (gradient,) = torch.autograd.grad(model(image.requires_grad_()).sum(), image)
    torch.testing.assert_close(slope, (gradient * direction).sum())
    each = torch.func.vmap(torch.func.grad(lambda x: model(x.unsqueeze(0)).sum()))(image.detach())
    torch.testing.assert_close(each, gradient)


FEW_BLOCKS = {
    "test_vim_s4d": {"depth": 1},
    "test_mambar": {"depth": 1},
    "test_vmamba": {"embed_dims": (8, 16), "depths": (1, 1)},
    "test_mambavision": {"depths": (1, 1, 2, 2)},
    "test_vssd": {"depths": (1, 1, 1, 1)},
    "test_s4nd": {"depth": 1},
    "test_convnext_s4nd": {"embed_dims": (8, 16), "depths": (1, 1)},
}


@pytest.mark.parametrize("name", FEW_BLOCKS, indirect=True)
@torch.no_grad()
def test_a_compiled_model_is_one_graph(name):
    """The other families' own files test the same."""
    torch._dynamo.reset()
    model, image = timm.create_model(name, num_classes=3, **FEW_BLOCKS[name]).eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image))


WRONG = {
    "test_vim": ({"depth": 0}, {"embed_dim": 0}, {"d_state": 0}),
    "test_vim_ssd": ({"d_state": 0}, {"head_dim": 48}, {"mixer": "s7"}, {"init": "corrected"}, {"d_conv": 0}),
    "test_vim_moe": ({"moe_every": 0}, {"router": "top2"}, {"num_slots": 0}, {"capacity_factor": 1.0}),
    "test_vim_s4d": ({"d_state": 7}, {"d_conv": 4}, {"init": "published"}, {"directions": "v1"}, {"expand": 0}),
    "test_mambar": ({"num_registers": 0}, {"depth": 0}, {"neck_reduction": 3}),
    "test_videomamba": ({"depth": 0}, {"d_conv": 0}),
    "test_vim2": ({"depths": (1, 1)}, {"expand": 0}),
    "test_vmamba": ({"embed_dims": (8, 16)}, {"version": "v1"}, {"d_state": 0}),
    "test_vssd": ({"num_heads": (1, 2, 3, 4)}, {"depths": (1, 1)}, {"d_state": 0}),
    "test_mambavision": ({"num_heads": (3, 4)}, {"window_sizes": (4,)}, {"stem_dim": 0}),
    "test_s4nd": ({"depth": 0}, {"axes": 3}, {"kind": "s6"}, {"rate": 0}),
    "test_convnext_s4nd": ({"depths": (1, 1)}, {"stem": "conv"}, {"num_frames": 3}),
}


def test_options_that_make_no_model(name):
    for options in ({"in_chans": 0}, {"num_classes": -1}, {"img_size": 2}, *WRONG[name]):
        with pytest.raises(ValueError, match="must .*got"):
            timm.create_model(name, **options)
    with pytest.raises(TypeError, match="nothing"):
        timm.create_model(name, nothing=1)


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
    counts = {
        "vim": 9,
        "vim_ssd": 2,
        "vim_moe": 0,
        "vim_s4d": 1,
        "vim2": 3,
        "videomamba": 16,
        "vmamba": 9,
        "vssd": 4,
        "mambar": 4,
        "mambavision": 9,
        "s4nd": 1,
        "convnext_s4nd": 1,
    }
    assert len(variants) == counts[family]


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
    block = "stages.1" if hasattr(model, "stages") else "layers.1"
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
