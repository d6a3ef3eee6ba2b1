"""A stand-in for the Hugging Face hub: it has one file, under every name."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

NAME = "test_vit.r160_in1k"


def weights_of(file: Path) -> dict[str, Tensor]:
    """Write random weights of the model NAME to a file; return them."""
    torch.manual_seed(4)
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, file)
    return weights


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub to download one file."""

    file: Path
    asked: list[str]
    """Paths of the downloads."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self._answer():
            self.asked.append(self.path)
            self.wfile.write(self.file.read_bytes())

    def _answer(self) -> bool:
        """Send the head of an answer; return whether a file was asked for (the hub's library asks for more)."""
        if "/resolve/" not in self.path:
            self.send_error(404)
            return False
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"weights"')
        self.send_header("Content-Length", str(self.file.stat().st_size))
        self.end_headers()
        return True

    def log_message(self, *arguments: Any) -> None:
        pass
