"""One run -> one file or folder, proved before it gets its name."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError

from gmscale.errors import UsageError, check_choice
from gmscale.export import card, onnx_file, timm_files
from gmscale.files import sync
from gmscale.trained import Trained, load

Format = Literal["safetensors", "onnx", "hf"]
FORMATS: tuple[str, ...] = get_args(Format)


def export(
    run_dir: str | Path,
    format: str = "safetensors",
    *,
    out: str | Path | None = None,
    checkpoint: str | int = "best",
    weights: str = "auto",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the weights of a run, finished or not, and return the path of the file, or for `hf` of the folder.

    `out` is the directory of the file, or for `hf` the folder itself. `checkpoint` is best, last or a step;
    `weights` is model, ema, or auto (the averaged ones if there are any). `say` hears a line about the result. What
    is there already stays if it is the same, and is otherwise a UsageError unless `overwrite` replaces it.
    UsageError for what cannot be asked for, RunError if the result does not do what the model does.
    """
    check_choice(format, FORMATS, "format")
    if format == "onnx":
        onnx_file.check_installed()
    trained = load(Path(run_dir), str(checkpoint), weights)
    say(f"{run_dir}: {trained.words}")
    home = Path(run_dir) / "export"
    if format == "hf":
        folder = Path(out) if out else home / trained.name
        with _appearing_in(folder, overwrite) as scratch:
            timm_files.write_weights(trained, scratch / timm_files.WEIGHTS)
            timm_files.write_config(trained, scratch)
            card.write(trained, scratch)
            timm_files.check_folder(trained, scratch)
        return folder
    folder = Path(out) if out else home
    file = f"{trained.name}.{format}"
    with _appearing_in(folder, overwrite) as scratch:
        if format == "onnx":
            say(onnx_file.write(trained, scratch / file))
        else:
            timm_files.write_weights(trained, scratch / file)
            timm_files.check_file(trained, scratch / file)
            say(f"loads with {_call(trained, folder / file)}")
    return folder / file


@contextmanager
def _appearing_in(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory; the files written to it appear in `folder` when all of them are complete."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; expected a directory")
    scratch = (folder if folder.is_dir() else folder.parent) / f".export.{secrets.token_hex(4)}.tmp"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        files = sorted(scratch.iterdir())
        changed = [file for file in files if not _same(file, folder / file.name)]
        taken = [folder / file.name for file in changed if (folder / file.name).exists()]
        if taken and not overwrite:
            raise UsageError(
                f"{taken[0]} is there already and differs; --overwrite replaces it, --out goes elsewhere"
            )
        for file in files:
            sync(file)
        if folder.is_dir():
            for file in changed:
                os.replace(file, folder / file.name)
        else:
            os.rename(scratch, folder)
        sync(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"the export cannot be written to {folder}: {reason}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes()


def _call(trained: Trained, file: Path) -> str:
    arguments = "".join(f", {name}={value!r}" for name, value in timm_files.arguments(trained).items())
    return f"timm.create_model({trained.config.model.name!r}{arguments}, checkpoint_path={str(file)!r})"
