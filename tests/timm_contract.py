"""A pytest plugin that runs timm's own tests on the models of this package.

timm's tests are in its source distribution only; take that of the installed version:

    pip download timm==VERSION --no-binary timm --no-deps -d sdist && tar xf sdist/timm-VERSION.tar.gz -C sdist
    PYTHONPATH=tests pytest -p timm_contract sdist/timm-VERSION/tests/test_models.py \\
        sdist/timm-VERSION/tests/test_model_input.py --rootdir sdist/timm-VERSION

Tests parametrised over timm's registry run on every model that `import vim` registers, or on those of them that match
the variable CONTRACT_MODELS (wildcards, commas between). Models of maps, whose configs have a `pool_size`, run the
tests of convolutional networks; the others those of transformers. Those of timm's tests for models by name that fit
ours run on the `test_*` models; the others are of timm's families, and left out. So are those that download weights.
Models of clips, whose names end in a number of frames, as `videomamba_tiny_f8`, cannot take the images of timm's tests.
"""

import fnmatch
import os
import re

import pytest
import timm
import timm.models
import timm.models._registry as registry

theirs = set(timm.list_models())
import vim  # noqa: E402, F401  registers ours

WILDCARDS = os.environ.get("CONTRACT_MODELS", "*").split(",")
CLIPS = re.compile(r"_f\d+$")
OURS = [
    name
    for name in timm.list_models()
    if name not in theirs and not CLIPS.search(name) and any(fnmatch.fnmatch(name, wildcard) for wildcard in WILDCARDS)
]
MAPS = [name for name in OURS if timm.get_pretrained_cfg(name).pool_size]
SMALL = [name for name in OURS if name.startswith("test_")]
# the tests that name timm's models, and what they run with here: values for their parameters after the model's name
NAMED = {
    "test_reset_classifier_keeps_pool": (),
    "test_features_only_grad_checkpointing_backward": (),
    "test_pruned_features_torchscript": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_head_hidden_size": ({},),
    "test_catavgmax_unsupported": (),
    "test_feature_getter_stage_ends_torchscript": (),
    "test_features_only_feature_cls_class": (),
    "test_prune_to_stem_feature": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_export_tracks_reset_pool_in_head": (3, "max"),
    "test_export_tracks_reset_classifier_structure": ({}, "avg", None),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_model_init_weights_after_to_empty": ({},),
    "test_headless_checkpoint_reload": ({},),
    "test_default_resize_hub_roundtrip": ({}, 64, 96),
}
NAMED_MAPS = (  # those of them for models of maps alone
    "test_feature_getter_stage_ends_torchscript",
    "test_prune_to_stem_feature",
    "test_prune_intermediate_layers_last_feature",
)
list_all = registry.list_models
covered = set()


def list_ours(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    """timm.list_models for ours alone: models of maps beside the convolutional networks, others beside transformers."""
    if pretrained:  # a test that downloads weights
        return []
    kind = OURS
    if "vit_*" in filter:  # a test of transformers
        filter, kind = "", [name for name in OURS if name not in MAPS]
    elif "vit_*" in exclude_filters:  # a test of convolutional networks
        kind = MAPS
    module = "" if "vision_transformer" in module else module
    names = list_all(filter, module, pretrained, exclude_filters, name_matches_cfg, include_tags)
    return [name for name in names if name.split(".")[0] in kind]


timm.list_models = timm.models.list_models = list_ours
timm.list_pretrained = lambda *args, **kwargs: []


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Give the tests that name timm's models the names of ours."""
    name = metafunc.definition.originalname
    if name in NAMED:
        for mark in metafunc.definition.iter_markers("parametrize"):
            names = mark.args[0]
            models = [model for model in SMALL if model in MAPS or name not in NAMED_MAPS]
            mark.args[1][:] = [
                model if isinstance(names, str) and "," not in names else (model, *NAMED[name]) for model in models
            ]


def pytest_collection_modifyitems(config, items):
    """Keep what runs on ours."""
    kept = [item for item in items if any(f"[{name}" in item.name or f"-{name}" in item.name for name in OURS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        covered.add(report.nodeid.partition("::")[2].partition("[")[0])


def pytest_terminal_summary(terminalreporter):
    """Say what ran, so that a run of nothing is seen."""
    terminalreporter.write_line(f"models: {', '.join(OURS)}; tests passed on them: {len(covered)}")
