"""gmscale export: a run's weights as others load them: a safetensors file, an ONNX file, a folder for the hub."""

from gmscale.export.command import main
from gmscale.export.exporting import FORMATS, export
from gmscale.export.hub import push

__all__ = ["FORMATS", "export", "main", "push"]
