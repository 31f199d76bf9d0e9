"""The import names that are served, and the objects behind them.

A module is a dict of its attributes; each value is `FILE.ATTRIBUTE` of this package. Extensions are what is compiled in
the published packages: a repository's own fork of mamba_ssm runs on them. The rest is served where there is no fork.
"""

MAMBA_VERSION, CONV_VERSION = "2.2.4", "1.4.0"  # the releases whose functions have the arguments of those here


def _same(file: str, *names: str) -> dict[str, str]:
    return {name: f"{file}.{name}" for name in names}


def _raw(kind: str) -> dict[str, str]:
    return {"fwd": f"raw_scan.{kind}.fwd", "bwd": f"raw_scan.{kind}.bwd"}


_PLAIN_NORMS = _same("norm", "RMSNorm", "layer_norm_fn", "rms_norm_fn")
_NORMS = _PLAIN_NORMS | {
    **_same("norm", "layer_norm_ref", "rms_norm_ref"),
    "_layer_norm_fwd": "language.norm_fwd",
    "_layer_norm_bwd": "language.norm_bwd",
}
_SCANS = _same("scan", "selective_scan_fn", "selective_scan_ref")
_CORE_SCANS = {"selective_scan_fn": "scan.core_scan_fn", "selective_scan_ref": "scan.core_scan_fn"}
_FUNCTIONS = _same("scan", "SelectiveScanFn", "MambaInnerFn", "MambaInnerFnNoOutProj", "BiMambaInnerFn")
_INNER = _same(
    *("scan", "mamba_inner_fn", "mamba_inner_fn_no_out_proj", "mamba_inner_ref", "bimamba_inner_fn"),
    "bimamba_inner_ref",
)
_RAW_CONV = {
    "causal_conv1d_fwd_function": "raw_conv.causal_conv1d_fwd",
    "causal_conv1d_bwd_function": "raw_conv.causal_conv1d_bwd",
    "causal_conv1d_update_function": "raw_conv.causal_conv1d_update_raw",
}
_CONV = _same("conv", "causal_conv1d_fn", "causal_conv1d_update")
_UPDATE = _same("ssd", "selective_state_update")
_SSD = _same("ssd", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
_BLOCK = _same("block", "Block")
# published files of mixers import these, and programs take them from there
_BESIDE_MAMBA = _BLOCK | _PLAIN_NORMS | _CONV | _UPDATE | _same("scan", "selective_scan_fn") | _INNER
_BESIDE_MAMBA2 = _CONV | _UPDATE | _SSD | {"RMSNormGated": "norm.GatedRMSNorm"}
_LANGUAGE = {"MambaLMHeadModel": "language.MambaLMHeadModel"}

EXTENSIONS: dict[str, dict[str, str]] = {
    "selective_scan_cuda": _raw("SelectiveScan"),
    "selective_scan_cuda_core": _raw("Core"),
    "selective_scan_cuda_ndstate": _raw("Core"),
    "selective_scan_cuda_nrow": _raw("Core"),
    "selective_scan_cuda_oflex": _raw("Oflex"),
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": "raw_conv.causal_conv1d_fwd",
        "causal_conv1d_bwd": "raw_conv.causal_conv1d_bwd",
        "causal_conv1d_update": "raw_conv.causal_conv1d_update_raw",
    },
    "causal_conv1d.cpp_functions": _RAW_CONV,
    "causal_conv1d.causal_conv1d_varlen": {
        "causal_conv1d_varlen_states": "conv.causal_conv1d_varlen_states",
        "causal_conv1d_varlen_states_ref": "conv.causal_conv1d_varlen_states",
    },
    "mamba_ssm.ops.triton.layernorm": _NORMS,
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm_gated": {
        "RMSNorm": "norm.GatedRMSNorm",
        "LayerNorm": "norm.GatedLayerNorm",
        **_same("norm", "layernorm_fn", "rmsnorm_fn"),
        "rms_norm_ref": "norm.gated_rms_norm_ref",
        "_layer_norm_fwd": "language.norm_fwd",
        "_layer_norm_bwd": "language.norm_bwd",
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        **_UPDATE,
        "selective_state_update_ref": "ssd.selective_state_update",
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        **_SSD,
        **_same("ssd", "MambaChunkScanCombinedFn", "MambaSplitConv1dScanCombinedFn"),
        "_mamba_chunk_scan_combined_fwd": "language.chunk_scan_fwd",
        "_mamba_chunk_scan_combined_bwd": "language.chunk_scan_bwd",
    },
    # forks of these import names of transformers that it no longer has
    "mamba_ssm.utils.generation": _same("language", "GenerationMixin", "InferenceParams", "decode"),
    "mamba_ssm.utils.hf": _same("language", "load_config_hf", "load_state_dict_hf"),
}
# kernels that copies of published files import: each name is there, and refuses to be called
KERNELS = tuple(
    f"mamba_ssm.ops.triton.{name}"
    for name in ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing", "k_activations")
)
PACKAGES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        "__version__": "names.MAMBA_VERSION",
        **_same("mamba", "Mamba"),
        **_same("mamba2", "Mamba2"),
        **_LANGUAGE,
        **_SCANS,
        **_same("scan", "mamba_inner_fn", "bimamba_inner_fn"),
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {**_same("mamba", "Mamba"), **_BESIDE_MAMBA},
    "mamba_ssm.modules.mamba_new": {"Mamba": "video_mamba_suite.HalvedMamba", **_BESIDE_MAMBA},
    "mamba_ssm.modules.mamba_simple_scan_norm": {"Mamba": "video_mamba_suite.ScanNormMamba", **_BESIDE_MAMBA},
    "mamba_ssm.modules.mamba2": {**_same("mamba2", "Mamba2"), **_BESIDE_MAMBA2},
    "mamba_ssm.modules.mamba2_simple": {**_same("mamba2", "Mamba2Simple"), **_BESIDE_MAMBA2},
    "mamba_ssm.modules.ssd_minimal": _same("ssd", "ssd_minimal_discrete"),
    "mamba_ssm.modules.mamba3": _same("language", "Mamba3"),
    "mamba_ssm.modules.block": _BLOCK,
    "mamba_ssm.modules.mlp": _same("block", "GatedMLP"),
    "mamba_ssm.modules.mha": _same("language", "MHA"),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {**_SCANS, **_INNER, **_FUNCTIONS},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.softplus": _same("softplus", "softplus"),
    **{name: {} for name in KERNELS},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _same("language", "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": {
        **_LANGUAGE,
        **_same("language", "MixerModel"),
        **_same("block", "Block", "create_block"),
        "_init_weights": "block.init_weights",
        # published models import these from here too
        **_same("mamba", "Mamba"),
        **_PLAIN_NORMS,
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.torch": {"custom_fwd": "shims.custom_fwd", "custom_bwd": "shims.custom_bwd"},
    "mamba_ssm.distributed": {},
    "mamba_ssm.distributed.tensor_parallel": _same("language", "ColumnParallelLinear", "RowParallelLinear"),
    "mamba_ssm.distributed.distributed_utils": _same("language", "all_reduce", "reduce_scatter"),
    "causal_conv1d": {"__version__": "names.CONV_VERSION", **_CONV},
    "causal_conv1d.causal_conv1d_interface": {
        **_CONV,
        **_RAW_CONV,
        **_same("conv", "causal_conv1d_ref", "causal_conv1d_update_ref"),
    },
    "selective_scan": _CORE_SCANS,
    "selective_scan.selective_scan_interface": _CORE_SCANS,
    "selective_scan_vmamba": {},
    "selective_scan_vmamba.selective_scan_cuda_core": _raw("Core"),
    "selective_scan_vmamba_pt202": {},
    "selective_scan_vmamba_pt202.selective_scan_cuda_core": _raw("Core"),
}
TOP = tuple(sorted({name.partition(".")[0] for name in (*EXTENSIONS, *PACKAGES)}))
