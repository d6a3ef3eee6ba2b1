"""ONNX: written by torch's exporter, then held against PyTorch's output on validation images."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmscale import __version__, data
from gmscale.config import TrainConfig
from gmscale.data import embedded
from gmscale.errors import RunError, UsageError
from gmscale.export import timm_files
from gmscale.trained import Trained

OPSET = 20
INPUT, OUTPUT = "images", "logits"
# Of the largest logit, or of 1: float32 rounding through a hundred layers stays ten times below it.
TOLERANCE = 1e-4
_IMAGES = 16
_BATCHES = (1, 5, 10)  # in all _IMAGES; none is the batch that the exporter sees
_MOST_BYTES = 2**31 - 2**24  # one file is one protobuf message, whose lengths are 31 bits


def check_installed() -> None:
    """Raise UsageError unless what exporting and checking needs is installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(f'--format onnx needs {", ".join(missing)}; pip install "gmscale[export]"')


def write(trained: Trained, path: Path) -> str:
    """Write the model for float32 images [N, C, S, S], normalised as in training, and say how well it agrees.

    The batch size N is free. Mean, deviation, class names and where the weights come from are in the file's
    metadata. RunError if the model cannot be exported, or answers otherwise than PyTorch's.
    """
    _check_size(trained)
    model = _exported(trained)
    _describe(model, trained)
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunError(f"the exported ONNX model is not valid: {' '.join(str(error).split())[:300]}") from error
    path.write_bytes(model.SerializeToString(deterministic=True))
    return _compare(trained, path)


def _exported(trained: Trained) -> Any:
    """Return the onnx.ModelProto."""
    from torch.export import Dim

    example = torch.zeros(2, *timm_files.preprocessing(trained)["input_size"])
    try:
        program = torch.onnx.export(
            trained.model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # the exporter has no error of its own for what it cannot translate
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"torch cannot export {trained.architecture} to ONNX: {reason}") from error
    assert program is not None
    return program.model_proto


def _describe(model: Any, trained: Trained) -> None:
    """Say in the model's metadata what it is, instead of where on this machine each node came from."""
    for part in (model.graph, *model.functions):
        _forget_sources(part)
    prepared = timm_files.preprocessing(trained)
    facts = {
        "architecture": trained.architecture,
        "step": trained.step,
        "weights": "averaged" if trained.averaged else "plain",
        "num_classes": trained.outputs,
        **({"classes": list(trained.classes)} if trained.classes else {}),
        **prepared,
    }
    model.producer_name, model.producer_version = "gmscale", __version__
    model.doc_string = (
        f"{INPUT}: float32 [N, {', '.join(map(str, prepared['input_size']))}], on a scale of 0 to 1, minus mean, "
        f"divided by std (see the metadata). {OUTPUT}: float32 [N, {trained.outputs}], before softmax."
    )
    del model.metadata_props[:]
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))


def _forget_sources(graph: Any) -> None:
    """Remove the exporter's notes, which hold paths of this machine, from a graph and those inside its nodes."""
    for part in (graph, *graph.node, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            # reading the field g would set it
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _forget_sources(inner)


def _compare(trained: Trained, path: Path) -> str:
    """Return a line on the largest difference from PyTorch's output; RunError beyond the tolerance."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, which = _images(trained.config)
    worst = largest = 0.0
    for batch in images.split(_BATCHES):
        with torch.no_grad():
            wanted = trained.model(batch)
        found = torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])
        if found.shape != wanted.shape:
            raise RunError(f"{path.name} answers {len(batch)} images with {list(found.shape)} numbers")
        # NaN must not pass: every comparison with it is false
        worst = max(worst, (found - wanted).abs().max().nan_to_num(float("inf")).item())
        largest = max(largest, wanted.abs().max().item())
    allowed = TOLERANCE * max(1.0, largest)
    agreement = (
        f"ONNX (opset {OPSET}) against PyTorch on {_IMAGES} {which} images in batches of "
        f"{', '.join(map(str, _BATCHES))}: largest difference {worst:.2g}, allowed {allowed:.2g}"
    )
    if not worst <= allowed:
        raise RunError(f"{agreement}; nothing was written")
    return agreement


def _images(config: TrainConfig) -> tuple[Tensor, str]:
    """Return float32 images [_IMAGES, C, S, S], and whether they are the run's validation or random ones."""
    settings = replace(config.data, workers=0, eval_batch_size_per_device=_IMAGES)
    source = embedded.place(settings) if settings.source == "embedded" else Path(settings.source)
    if source.is_dir():  # neither built nor fetched for this
        try:
            images = next(iter(data.val_loader(settings, 0, 1)))[0]
        except (OSError, RunError, UsageError, StopIteration):
            images = torch.empty(0)
        if len(images) == _IMAGES:
            return data.normalize(images, settings), "validation"
    size = (_IMAGES, settings.channels, settings.image_size, settings.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)), "random"


def _check_size(trained: Trained) -> None:
    size = sum(t.numel() * t.element_size() for t in trained.model.state_dict().values())
    if size > _MOST_BYTES:
        raise UsageError(
            f"{trained.architecture} has {size / 2**30:.1f} GiB of weights, and an ONNX file holds at most 2; "
            "use --format safetensors or hf"
        )
