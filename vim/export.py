"""Export of models to torch.export's .pt2, to TorchScript's .ts and to ONNX, with dynamic batch.

A .pt2 or .ts file calls the ops of this package, at the same speed: `import vim` before loading it. An ONNX file
holds standard operators only. Each selective scan is a `Scan`, whose size does not depend on the number of tokens.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

import vim  # noqa: F401  registers the models and the ops
from vim.data import input_shape
from vim.engine.files import written_whole
from vim.engine.weights import create_own, load_published
from vim.errors import UserError
from vim.layers import constant_kernels
from vim.layers.block import MambaBlock

Format = Literal["torch", "torchscript", "onnx"]

SUFFIXES: dict[str, Format] = {".pt2": "torch", ".ts": "torchscript", ".onnx": "onnx"}
TOLERANCE = 1e-4  # rounding gives about 1e-6, a direction that is not reversed 1e-2


@dataclass
class Difference:
    """The greatest difference between two outputs for a batch, and its ratio to the greatest output."""

    batch_size: int
    absolute: float
    relative: float


def build(name: str, *, checkpoint: Path | None = None, img_size: int | None = None) -> nn.Module:
    """Return a model of this package in evaluation mode.

    Args:
        name: a timm name, such as vim_tiny, or local-dir:FOLDER, which has weights.
        checkpoint: weights of the published layout. Without them a registered name has random weights.
        img_size: height and width in pixels; the model's own if None.

    Raises:
        UserError: no such model, weights that do not fit it, or a size that it does not take.
    """
    model = load_published(name, checkpoint) if checkpoint else create_own(name, pretrained=":" in name)
    if img_size is not None:
        try:
            model.set_input_size(img_size)
        except ValueError as error:
            raise UserError(f"{name} does not take images of {img_size} pixels: {error}") from error
    return model.eval()


def choose_format(path: Path) -> Format:
    """Return the format of a file by its suffix.

    Raises:
        UserError: no format has this suffix.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"the file must end in {' or '.join(SUFFIXES)}, got {path}: rename it, or set --format")
    return SUFFIXES[path.suffix]


def export(
    model: nn.Module,
    path: Path,
    *,
    format: Format,
    decompositions: Mapping[Any, Callable[..., Any]],
    function: Callable[[int], str] | None = None,
    batch_sizes: tuple[int, ...] = (1, 2, 3),
) -> list[Difference]:
    """Write a model, load the file, and compare both on random images. A failure leaves no file.

    Args:
        model: in evaluation mode, on the CPU.
        decompositions: for ONNX, the replacement of each op of this package: `vim.kernels.traceable.DECOMPOSITIONS`.
        function: for ONNX, the function that they call, for an opset: `vim.kernels.traceable.onnx_loop`.

    Returns:
        a difference for each batch size.

    Raises:
        OSError: the file cannot be written.
        UserError: its path is a folder, or a difference is above :data:`TOLERANCE`.
    """
    with written_whole(path) as beside:
        if format == "onnx":
            _save_onnx(_trace_blocks_once(model), beside, decompositions, function)
        else:
            whole = io.BytesIO()  # a full disk within PyTorch's own saving would abort the process
            if format == "torch":
                torch.export.save(_trace(model), whole)
            else:
                torch.jit.save(_trace_script(model), whole)
            beside.write_bytes(whole.getbuffer())
        load = {"torch": load_torch, "torchscript": load_torchscript, "onnx": load_onnx}[format]
        run = load(beside)
        return [_compare(model, run, batch_size) for batch_size in batch_sizes]


def load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    """Load a .pt2 file as a function of images."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def load_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    """Load a .ts file as a function of images."""
    with path.open("rb") as file:
        return torch.jit.load(file)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Load an ONNX file in ONNX Runtime, on the CPU, as a function of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def _trace(model: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    images = _random_images(model, 2)
    with constant_kernels(model, images):  # the images' size is fixed too
        return torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=strict)


def _trace_blocks_once(model: nn.Module) -> torch.export.ExportedProgram:
    """Trace equal blocks as calls of one graph, which is then decomposed once. Only a strict trace knows such calls."""
    if not any(isinstance(module, MambaBlock) for module in model.modules()):
        return _trace(model)  # a strict trace takes longer
    with patch.object(MambaBlock, "forward", torch.compiler.nested_compile_region(MambaBlock.forward)):
        return _trace(model, strict=True)


@torch.no_grad()
def _trace_script(model: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants, and that TorchScript is deprecated
        return torch.jit.trace(model, _random_images(model, 2), check_trace=False)


@torch.no_grad()
def _save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    decompositions: Mapping[Any, Callable[..., Any]],
    function: Callable[[int], str] | None,
) -> None:
    import onnx_ir
    from onnx import parser
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript import optimizer

    # torch.onnx has transforms of its own, which OpenVINO cannot read
    own = {op: function for op, function in decompositions.items() if op.namespace == "aten"}
    if any(node.target in own for node in program.graph.nodes):
        program = program.run_decompositions(own)
    # In the table that torch.onnx.export takes: a run_decompositions before it would take as long as the export itself.
    with patch.dict(torch._decomp.decomposition_table, decompositions):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            optimize=False,  # takes minutes: the square of the nodes. ONNX Runtime does the same when it loads the file
            verbose=False,
        )
    assert exported is not None
    if function is not None:
        text = function(exported.model.opset_imports[""])
        loop = onnx_ir.serde.deserialize_function(parser.parse_function(text))
        exported.model.functions[loop.identifier()] = loop
    optimizer.inline(exported.model)
    optimizer.fold_constants(exported.model)
    passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),  # a stack trace for each node
    )(exported.model)
    assert {node.domain for node in exported.model.graph.all_nodes()} == {""}, "only standard operators"
    exported.save(path, external_data=False)


@torch.no_grad()
def _compare(model: nn.Module, run: Callable[[Tensor], Tensor], batch_size: int) -> Difference:
    images = _random_images(model, batch_size)
    want, got = model(images), run(images)
    absolute = (got - want).abs().max().item()
    relative = absolute / want.abs().max().item()
    if not relative <= TOLERANCE:  # nan is not
        raise UserError(
            f"the exported {type(model).__name__} differs from the model by {relative:.1e} of the greatest output at "
            f"batch size {batch_size}: at most {TOLERANCE:.0e} expected, nothing is kept"
        )
    return Difference(batch_size, absolute, relative)


def _random_images(model: nn.Module, batch_size: int) -> Tensor:
    draw = torch.Generator().manual_seed(batch_size)
    return torch.randn(batch_size, *input_shape(model), generator=draw)
