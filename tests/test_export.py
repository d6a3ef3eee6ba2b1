"""Exports are loaded by those they are for: plain timm, onnxruntime, the hub's own client."""

import json
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from gmscale import cli, trained
from gmscale import config as configuration
from gmscale.checkpoint import shards
from gmscale.checkpoint.tensors import write_tensors
from gmscale.errors import RunError, UsageError
from gmscale.export import export, onnx_file, push
from gmscale.parallel import WeightShard

TOKEN = "hf_" + "t" * 34
pytestmark = pytest.mark.filterwarnings("ignore:the averaged weights have top1")


@pytest.fixture(scope="module")
def vit_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps without mask or average, of a model whose position embeddings fix the image size."""
    run_dir = tmp_path_factory.mktemp("runs") / "vit"
    sections = {
        "run": {"epochs": 0.34},
        "model": {"name": "test_vit", "kwargs": {"img_size": 32, "class_token": False, "global_pool": "avg"}},
        "mask": {"enabled": False},
        "optim": {"opt": "adamw", "lr": 1e-3},
    }  # fmt: skip
    tiny.train(tiny.config(cache, run_dir, **sections))
    return run_dir


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a folder for the hub."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(finished_run, "hf", out=tmp_path_factory.mktemp("hf") / "folder")


@pytest.fixture(scope="module")
def onnx(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The finished run as an ONNX file, and what was said of it."""
    said: list[str] = []
    return export(finished_run, "onnx", out=tmp_path_factory.mktemp("onnx"), weights="model", say=said.append), said


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer(TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # read once, when the client was imported
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def checkpoint_tensors(run_dir: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def error_of(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run gmscale export and return its status and the last line it said; nothing else must be an error."""
    with pytest.raises(SystemExit) as exit:
        cli.main(["export", *argv])
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return int(exit.value.code or 0), said.err.strip().splitlines()[-1]


# -- safetensors ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("checkpoint", "weights", "step", "name"),
    [
        ("last", "model", 9, "model"),
        ("last", "ema", 9, "model_ema"),
        (8, "auto", 8, "model_ema"),
        ("best", "model", None, "model"),
    ],
)
def test_a_file_gives_plain_timm_the_weights_of_the_checkpoint(
    finished_run: Path, tmp_path: Path, checkpoint: str | int, weights: str, step: int | None, name: str
) -> None:
    said: list[str] = []
    path = export(finished_run, out=tmp_path, checkpoint=checkpoint, weights=weights, say=said.append)
    if step is None:
        states = [json.loads(p.read_text()) for p in finished_run.glob("checkpoints/*/state.json")]
        step = max((s["top1"], s["step"]) for s in states if s["top1"] is not None)[1]
    wanted = checkpoint_tensors(finished_run, step, name)
    assert path == tmp_path / f"test_byobnet-step{step}{'-ema' if name == 'model_ema' else ''}.safetensors"
    assert same(load_file(path), wanted)
    model = timm.create_model("test_byobnet", num_classes=10, checkpoint_path=path)
    assert same(model.state_dict(), wanted)
    # the line that says how to load it is true
    assert same(eval(said[-1].removeprefix("loads with "), {"timm": timm}).state_dict(), wanted)


def test_a_model_with_arguments_and_another_image_size_loads_too(vit_run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export(vit_run, out=tmp_path, say=said.append)
    wanted = checkpoint_tensors(vit_run, 2, "model")
    assert same(eval(said[-1].removeprefix("loads with "), {"timm": timm}).state_dict(), wanted)
    made = timm.create_model(f"local-dir:{export(vit_run, 'hf', out=tmp_path / 'hf')}", pretrained=True)
    assert same(made.state_dict(), wanted)
    with torch.no_grad():
        assert made.eval()(torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).shape == (1, 10)


def test_sharded_weights_become_one_file(vit_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(vit_run, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "step-00000002"
    wanted = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    for rank in range(2):  # each has half of every weight
        halves = {}
        for name, tensor in wanted.items():
            flat, middle = tensor.flatten(), tensor.numel() // 2
            entries = flat[:middle] if rank == 0 else flat[middle:]
            halves[name] = WeightShard(tuple(tensor.shape), middle * rank, entries)
        file = checkpoint / shards.shard_name(rank, 2)
        write_tensors(file, {name: half.entries for name, half in halves.items()}, shards.places(halves))
    assert same(load_file(export(run)), wanted)


def test_an_unfinished_run_without_data_json_exports_too(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "data.json").unlink()
    path = export(run, "hf")
    assert path == run / "export" / path.name
    card = (path / "README.md").read_text()
    assert "had not finished" in card
    assert "10, their names unknown" in card
    assert "label_names" not in card + (path / "config.json").read_text()


# -- places --------------------------------------------------------------------------------------------------
def test_the_same_again_is_fine_and_something_else_is_not_overwritten_unasked(run: Path) -> None:
    path = export(run, weights="model")
    assert path.parent == run / "export"
    assert export(run, weights="model") == path
    good = path.read_bytes()
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="differs; --overwrite"):
        export(run, weights="model")
    assert path.read_bytes() == b"mine"
    export(run, weights="model", overwrite=True)
    assert path.read_bytes() == good
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_overwriting_a_folder_leaves_other_files_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    export(run, "hf", out=out)
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("a card that its owner edited")
    with pytest.raises(UsageError, match=r"README.md is there already"):
        export(run, "hf", out=out)
    export(run, "hf", out=out, overwrite=True)
    assert "# test_byobnet" in (out / "README.md").read_text()
    assert {p.name for p in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "notes.txt"}


def test_a_place_that_cannot_be_written_is_one_line(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a directory"):
        export(finished_run, out=tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be written"):
        export(finished_run, out=tmp_path / "file" / "below")


# -- what cannot be asked for --------------------------------------------------------------------------------
def test_mistakes_are_one_line_that_names_the_choices(
    run: Path, vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*argv: str) -> str:
        status, said = error_of(*argv, capsys=capsys)
        assert status == 2
        return said

    assert "is not a run directory" in line(str(tmp_path))
    assert "no checkpoint of step 7; it has 8, 9" in line(str(run), "--checkpoint", "7")
    assert "expected best, last or a step" in line(str(run), "--checkpoint", "newest")
    assert "invalid choice: 'onx'" in line(str(run), "--format", "onx")
    assert "holds no averaged weights" in line(str(vit_run), "--weights", "ema")
    assert "--format is onnx" in line(str(run), "--format", "onnx", "--push", "a/b")
    assert "expected OWNER/NAME" in line(str(run), "--format", "hf", "--push", "name")
    assert "add --push" in line(str(run), "--format", "hf", "--private")
    shutil.rmtree(run / "checkpoints")
    assert "holds no complete checkpoint" in line(str(run))


def test_missing_packages_name_their_extra(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UsageError, match=r'needs onnxruntime; pip install "gmscale\[export\]"'):
        export(finished_run, "onnx")


def test_averaged_weights_that_are_worse_are_pointed_out(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {"validation": 50.0, "validation_ema": 40.0}
    lines = [{**line, "top1": scores.get(line["phase"], 0.0)} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match=r"averaged weights have top1 40.00 %, the plain ones 50.00 %"):
        trained.load(run, "last", "auto")


# -- hf ------------------------------------------------------------------------------------------------------
def test_a_folder_gives_plain_timm_the_model_and_its_preprocessing(finished_run: Path, folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same(model.state_dict(), checkpoint_tensors(finished_run, 9, "model_ema"))
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    config = configuration.load(finished_run / "config.yaml").data
    found = timm.data.resolve_model_data_config(model)
    assert (*found["mean"], *found["std"], found["crop_pct"]) == (*config.mean, *config.std, config.crop_pct)
    assert (*found["input_size"], found["interpolation"]) == (3, 32, 32, config.eval_interpolation)


def test_the_card_tells_the_hub_and_the_reader_what_the_run_recorded(finished_run: Path, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.license == "unknown"
    records = [r for r in tiny.metrics(finished_run) if r["phase"] == "validation_ema" and r["step"] == 9]
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results == {"top1 (%)": records[0]["top1"], "top5 (%)": records[0]["top5"]}
    touched = json.loads((finished_run / "touched.json").read_text())["mask"]["touched"]
    assert f"{len(touched)} parameters ({sum(t['entries'] for t in touched):,} entries)" in text
    assert f"| averaged | 9 | {records[0]['top1']:.2f} |" in text
    environment = json.loads((finished_run / "environment.json").read_text())
    assert f"timm {environment['timm']}" in text
    assert environment["hostname"] not in text.split()
    assert "100 images" in text
    assert "25 images" in text
    assert str(finished_run.parent) not in text
    assert not re.search(r" None |\bnan\b|\{\{|\}\}", text)


def test_the_settings_of_the_card_are_those_of_the_run(finished_run: Path, folder: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert block
    shown, run = yaml.safe_load(block[1]), yaml.safe_load((finished_run / "config.yaml").read_text())
    configuration.from_dict(shown)
    for settings in (shown, run):
        del settings["run"]["dir"], settings["data"]["cache_dir"]
    assert {name: {**run[name]} for name in run} == {name: {k: shown[name][k] for k in run[name]} for name in run}


def test_the_code_of_the_card_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert block
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(StringIO()) as printed:
        exec(block[1].replace("PATH", str(folder)), {})
    label, probability = printed.getvalue().split()
    assert label in "0123456789"
    assert 0 < float(probability) <= 1


def test_a_card_says_nothing_that_its_run_does_not_know(vit_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(vit_run, tmp_path / "run"))
    for name in ("environment.json", "data.json", "summary.json"):
        (run / name).unlink(missing_ok=True)
    (run / "metrics.jsonl").write_text("")
    text = (export(run, "hf") / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert "The run holds no evaluation." in text
    assert "number of devices unknown" in text
    assert "without a gradient mask" in text
    assert "## Gradient mask\n\nNone.\n" in text
    assert "Momentum" not in text.split("```")[0]
    assert "Versions" not in text


def test_a_card_holds_no_path_to_the_data_and_no_token(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["source"] = "/home/someone/secret project/imagenet|shards"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] = f"gmscale train --data.source '{settings['data']['source']}' --optim.lr 0.2"
    (run / "environment.json").write_text(json.dumps(environment))
    text = (export(run, "hf") / "README.md").read_text()
    assert "/home/someone" not in text
    assert "--optim.lr 0.2" in text
    assert "`imagenet\\|shards`" in text


# -- onnx ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_onnx_file_answers_as_pytorch_does_for_any_batch(
    finished_run: Path, onnx: tuple[Path, list[str]]
) -> None:
    import onnxruntime

    path, said = onnx
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = timm.create_model("test_byobnet", num_classes=10).eval()
    model.load_state_dict(checkpoint_tensors(finished_run, 9, "model"))
    for size in (1, 3):
        images = torch.randn(size, 3, 32, 32)
        with torch.no_grad():
            wanted = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert "on 16 validation images" in said[-1]
    # nothing of this machine
    assert b"site-packages" not in path.read_bytes()
    assert b".py" not in path.read_bytes()


@pytest.mark.slow
def test_an_onnx_file_that_answers_otherwise_is_not_left_behind(
    run: Path, onnx: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx as library

    wrong = library.load(onnx[0])
    bias = next(t for t in wrong.graph.initializer if t.name == "head.fc.bias")
    bias.CopyFrom(
        library.numpy_helper.from_array(library.numpy_helper.to_array(bias) + np.float32(1e-3), bias.name)
    )
    monkeypatch.setattr(onnx_file, "_exported", lambda trained: wrong)
    shutil.rmtree(run / "samples")
    with pytest.raises(RunError, match=r"largest difference 0\.001, allowed 0\.0001; nothing was written"):
        export(run, "onnx", weights="model")
    assert not (run / "export").exists()
    assert not list(run.glob(".*"))


@pytest.mark.slow
def test_without_the_data_an_onnx_file_is_checked_on_random_images(
    run: Path, onnx: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx as library

    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["cache_dir"] = str(run / "elsewhere")
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(onnx_file, "_exported", lambda trained: library.load(onnx[0]))
    said: list[str] = []
    assert export(run, "onnx", weights="model", say=said.append).read_bytes() == onnx[0].read_bytes()
    assert "on 16 random images" in said[-1]
    assert not (run / "elsewhere").exists()


# -- the hub -------------------------------------------------------------------------------------------------
def test_push_uploads_the_files_of_the_folder_and_nothing_else(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "to the hub"
    out.mkdir()
    (out / "secret.txt").write_text("not for the hub")
    with pytest.raises(SystemExit) as exit:
        cli.main(["export", str(run), "--format", "hf", "--out", str(out), "--push", "me/digits", "--private"])
    assert exit.value.code == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert f"pushed to {hub.address}/me/digits" in said.err
    assert hub.visibility == {"me/digits": "private"}
    arrived = hub.repositories["me/digits"]
    assert arrived == {
        name: (out / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")
    }
    assert list(hub.objects.values()) == [arrived["model.safetensors"]]


def test_nothing_is_pushed_unasked(run: Path, hub: HubServer) -> None:
    export(run, "hf")
    assert (hub.kinds, hub.repositories, hub.objects) == ({}, {}, {})


def test_push_fails_in_one_line_and_the_folder_stays(
    folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure(kind: type[Exception] = RunError) -> str:
        with pytest.raises(kind) as caught:
            push(folder, "me/digits")
        message = str(caught.value)
        assert "\n" not in message
        assert f"{folder} stays" in message
        assert (folder / "model.safetensors").is_file()
        return message

    hub.kinds["me/digits"] = "dataset"
    assert "is a dataset, not a model" in failure()
    hub.kinds.clear()
    hub.refusals["/api/models/me/digits/commit"] = 403
    assert "403" in failure()
    hub.refusals.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in failure()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in failure()
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token: set HF_TOKEN" in failure(UsageError)
