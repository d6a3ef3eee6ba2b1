"""The report on synthetic run directories whose numbers can be checked by hand."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from gmscale.errors import UsageError
from gmscale.report import arms, find_runs, load_run, write_report

VOID = {"meta", "img", "br", "line", "input", "link", "hr"}


def make_run(
    path: Path,
    arm: str = "no mask",
    seed: int = 0,
    top1: float = 80.0,
    *,
    lr: float = 0.1,
    finished: bool = True,
    source: str = "embedded",
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a run of 4 steps, 2 epochs; `settings` are further dotted configuration keys."""
    masked = arm != "no mask"
    config: dict[str, dict[str, Any]] = {
        "run": {"arm": arm, "seed": seed, "epochs": 2, "dir": str(path)},
        "model": {"name": "resnet18"},
        "data": {"source": source, "size": 400, "batch_size_per_device": 8, "workers": seed},
        "optim": {"opt": "sgd", "lr": lr},
        "mask": {"enabled": masked, "operator": "pool", "strength": 0.5, "seed": seed},
        "output": {"enabled": False, "seed": seed},
    }
    for key, value in (settings or {}).items():
        section, name = key.split(".")
        config[section][name] = value
    mask = {"strength": 0.5, "kept_entries": 0.3, "kept_energy": 0.9, "hook_ms": 2.0} if masked else {}
    lines: list[dict[str, Any]] = []
    for step in range(1, 5 if finished else 3):
        at = {"step": step, "epoch": step / 2}
        lines.append(at | {"phase": "train", "loss": 2.0 / step, "step_ms": 50.0, "data_ms": 3.0} | mask)
        lines.append(at | {"phase": "validation", "loss": 1.0, "top1": top1 - 4 + step, "count": 100})
        if masked:
            layers = {"conv1.weight": 0.25, "fc.weight": 0.75}
            lines.append(at | {"phase": "layers", "kept_entries": layers, "kept_energy": layers})

    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(
        json.dumps({"torch": "2.14.1", "commit": "c0ffee", "world_size": 2, "command": f"run --seed {seed} '<b>'"})
    )
    (path / "touched.json").write_text(
        json.dumps(
            {
                "mask": {
                    "site": "ddp",
                    "touched": [{"name": "conv1.weight", "entries": 27}, {"name": "fc.weight", "entries": 3}],
                    "passed": ["bn1.weight"],
                }
            }
        )
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"steps": 4, "top1": top1, "loss": 0.5, "images_per_s": 100.0, "hook_ms": mask.get("hook_ms")}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def make_arms(root: Path, values: dict[str, Sequence[float]]) -> Path:
    for arm, tops in values.items():
        for seed, top1 in enumerate(tops):
            make_run(root / arm / f"seed-{seed}", arm, seed, top1)
    return root


class Page(HTMLParser):
    """Checks nesting while it collects text and the addresses a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# -- reading --------------------------------------------------------------------------------------
def test_load_finished_run(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "r", "pool 0.5", 3, 81.5))
    assert (run.label, run.seed, run.finished, run.last_step) == ("pool 0.5", 3, True, 4)
    assert run.final("top1") == 81.5
    assert run.final("hook_share") is None
    assert [line["step"] for line in run.lines("validation")] == [1, 2, 3, 4]


def test_a_mask_of_layer_outputs_alone_is_a_mask_and_no_reference(tmp_path: Path) -> None:
    output = {"mask.enabled": False, "output.enabled": True, "output.operator": "log", "output.strength": 0.25}
    for seed in range(2):
        make_run(tmp_path / f"none-{seed}", "no mask", seed, 80.0)
        for sigma in (1.0, 2.0):
            settings = output | {"run.arm": None, "output.sigma": sigma}
            make_run(tmp_path / f"{sigma}-{seed}", "output", seed, 90.0 + sigma, settings=settings)
    found = arms(find_runs([tmp_path])).arms
    assert [(arm.label, arm.masked, arm.reference) for arm in found] == [
        ("no mask", False, ""),
        ("output log 0.25, sigma 2", True, "no mask"),
        ("output log 0.25, sigma 1", True, "no mask"),
    ]
    page = Page(write_report([tmp_path]))
    assert "output.sigma" in page.text


def test_bytes_on_the_wire_and_gradient_quality_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "pool 1 consensus", 0, 80.0)
    with open(path / "metrics.jsonl", "a") as file:
        for step in (2, 4):
            file.write(json.dumps({"phase": "train", "step": step, "epoch": step / 2, "wire_share": 0.36}) + "\n")
            file.write(json.dumps({"phase": "quality", "step": step, "gain": -0.1, "control_gain": -0.2}) + "\n")
    (path / "summary.json").write_text(json.dumps({"steps": 4, "top1": 80.0, "wire_share": 0.36}))
    shown = Page(write_report([tmp_path])).text
    assert "Bytes, % of dense" in shown
    assert "36.0" in shown
    assert "Gradient quality" in shown
    plain = Page(write_report([make_run(tmp_path / "plain" / "run", "no mask", 0, 80.0)])).text
    assert "Bytes," not in plain
    assert "Gradient quality" not in plain


def test_load_unfinished_run_with_a_torn_last_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r", top1=80.0, finished=False)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 3, "phase": "tr\u2026'.encode()[:-1])
    run = load_run(path)
    assert (run.finished, run.last_step) == (False, 2)
    assert run.final("top1") == 78.0  # the validation at step 2


def test_a_torn_line_inside_is_an_error(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r")
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text('{"step":\n' + text)
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        load_run(path)


def test_a_run_that_has_logged_nothing_yet(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r", finished=False)
    (path / "metrics.jsonl").unlink()
    (path / "touched.json").unlink()
    assert load_run(path).last_step == 0
    assert "unfinished at step 0" in Page(write_report([path])).text


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "pool 0.5"),
        ({"mask.operator": "log", "mask.strength": 1.0}, "log 1"),
        ({"mask.enabled": False}, "no mask"),
        ({"run.arm": "mine"}, "mine"),
    ],
)
def test_label(tmp_path: Path, settings: dict[str, Any], label: str) -> None:
    assert load_run(make_run(tmp_path / "r", arm="", settings={"run.arm": "", **settings})).label == label


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent is not a run directory: no such directory"):
        load_run(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"config\.yaml is missing"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {seed: 0}")
    with pytest.raises(UsageError, match=r"none of environment\.json, metrics\.jsonl, summary\.json"):
        load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("lr: 1")
    with pytest.raises(UsageError, match=r"config\.yaml is not the configuration of a run: run\.seed"):
        load_run(tmp_path)


def test_find_runs_at_any_depth_and_each_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "deep" / "r0")
    make_run(tmp_path / "r1" / "seed-1", seed=1)
    found = find_runs([tmp_path, tmp_path / "r1", tmp_path / "r1" / "seed-1"])
    assert [run.path.name for run in found] == ["r0", "seed-1"]


def test_find_runs_says_where_it_found_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path.name} holds no run"):
        find_runs([tmp_path])
    with pytest.raises(UsageError, match="no run directory was named"):
        find_runs([])


# -- the arms table -------------------------------------------------------------------------------
def test_arms_are_paired_by_seed(tmp_path: Path) -> None:
    root = make_arms(tmp_path, {"no mask": [80, 82, 84, 86, 88], "pool 0.5": [81, 84, 87, 90, 93]})
    make_run(tmp_path / "extra", "pool 0.5", seed=9, top1=0.0)  # no partner: in the mean, in no difference
    baseline, masked = arms(find_runs([root])).arms
    assert (baseline.label, baseline.values["top1"].mean, baseline.difference) == ("no mask", 84, None)
    assert baseline.values["top1"].std == pytest.approx(10**0.5)
    assert masked.values["top1"].mean == pytest.approx(435 / 6)
    assert masked.seed_differences == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}
    assert masked.difference is not None
    assert masked.difference.p == pytest.approx(0.0132356, rel=1e-4)
    assert masked.verdict == "higher than no mask by 3.0 points (95 % interval 1.0 to 5.0, 5 paired seeds)"


def test_several_arms_are_corrected_together(tmp_path: Path) -> None:
    # Alone, p = 0.0132 is significant; as the smallest of four it becomes 0.0529.
    others = {f"other {i}": [80.5, 81.5, 84.5, 85.5, 88] for i in range(3)}
    root = make_arms(tmp_path, {"no mask": [80, 82, 84, 86, 88], "pool 0.5": [81, 84, 87, 90, 93], **others})
    table = arms(find_runs([root]))
    assert {arm.verdict for arm in table.arms if arm.masked} == {"no significant difference (5 paired seeds)"}
    assert any("Holm's correction to the 4 comparisons" in note for note in table.footnotes)


def test_unfinished_runs_and_repeated_seeds_are_no_evidence(tmp_path: Path) -> None:
    make_run(tmp_path / "a", top1=80.0)
    make_run(tmp_path / "again", top1=90.0)
    make_run(tmp_path / "b", seed=1, top1=10.0, finished=False)
    (arm,) = arms(find_runs([tmp_path])).arms
    assert (arm.values["top1"].n, arm.values["top1"].mean) == (1, 85.0)


def test_no_baseline(tmp_path: Path) -> None:
    table = arms(find_runs([make_arms(tmp_path, {"pool 0.5": [80, 81], "log 1": [80, 82]})]))
    assert [arm.difference for arm in table.arms] == [None, None]
    assert "no unmasked arm" in table.control


def test_another_workload_is_no_reference(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "pool 0.5", settings={"model.name": "resnet50"})
    assert all(arm.difference is None for arm in arms(find_runs([tmp_path])).arms)


def test_settings_split_an_arm_and_the_best_baseline_is_the_reference(tmp_path: Path) -> None:
    for lr, top1 in ((0.05, 70.0), (0.1, 75.0), (0.2, 72.0)):
        for seed in range(2):
            make_run(tmp_path / f"{lr}-{seed}", "no mask", seed, top1, lr=lr)
    make_run(tmp_path / "m", "pool 0.5", 0, 74.0)
    table = arms(find_runs([tmp_path]))
    labels = ["no mask, lr 0.1", "no mask, lr 0.2", "no mask, lr 0.05", "pool 0.5"]
    assert [arm.label for arm in table.arms] == labels
    assert (table.arms[-1].reference, table.arms[-1].seed_differences) == ("no mask, lr 0.1", {0: -1.0})
    assert table.control == ""


def test_a_baseline_best_at_the_edge_of_its_sweep_is_not_tuned(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lr=0.1, top1=70)
    make_run(tmp_path / "b", lr=0.2, top1=75)
    make_run(tmp_path / "m", "pool 0.5")
    assert "0.2, lies at the edge of its sweep (0.1 to 0.2)" in arms(find_runs([tmp_path])).control


# -- the page -------------------------------------------------------------------------------------
def test_page_is_whole_self_contained_and_honest(tmp_path: Path) -> None:
    root = make_arms(tmp_path / "set", {"no mask": [80, 82], "pool 0.5": [81, 84]})
    samples = root / "pool 0.5" / "seed-0" / "samples"
    samples.mkdir()
    Image.new("RGB", (4, 4), "teal").save(samples / "000.png")
    shots = [{"file": "000.png", "label": "3", "predicted": predicted, "confidence": 0.4} for predicted in "35"]
    (samples / "samples.json").write_text(json.dumps([*shots, {"file": "gone.png", "label": "1"}]))
    make_run(root / "more", "pool 0.5", 7, finished=False)

    out = write_report([root])
    assert out == root / "report.html"
    assert not list(root.glob(".*"))
    page = Page(out)
    assert page.addresses
    assert all(
        address.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,")) for address in page.addresses
    )
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", page.source)
    # 2 learning curves, differences, kept entries and strength, 2 layer figures, step time; 2 samples.
    assert page.tags.count("img") == 8 + 2
    for words in (
        "Toy-sized data",
        "nothing here follows for ImageNet",
        "Uncontrolled comparison",
        "Too few seeds",
        "1 run is not finished",
        "unfinished at step 2",
        "81.00 ± 1.41",  # no mask: 80, 82
        "+1.50",  # paired: 1 and 2
        "fewer than five seeds: not evidence (+1.5 points, 2 paired seeds)",
        "2 parameters (30 entries), 1 pass through",
        "✓ 3",
        "✗ 3 → 5",
        "c0ffee",
        "run --seed 0 '<b>'",
    ):
        assert words in page.text


def test_everything_a_run_says_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $x^ & \"'"
    make_run(tmp_path / "r", evil, settings={"model.name": evil})
    page = Page(write_report([tmp_path / "r"]))
    assert "script" not in page.tags
    assert evil in page.text


def test_photographs_are_not_called_toy_sized(tmp_path: Path) -> None:
    assert "Toy-sized" not in Page(write_report([make_run(tmp_path / "r", source="shards/imagenet")])).text


def test_default_place(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "set" / "a"), make_run(tmp_path / "set" / "b", seed=1)
    assert write_report([one]) == one / "report.html"
    assert write_report([one, two]) == tmp_path / "set" / "report.html"
    assert write_report([one], tmp_path) == tmp_path / "report.html"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the report to .*file/report\.html"):
        write_report([run], tmp_path / "file" / "report.html")


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    root = make_arms(tmp_path / "set", {"no mask": [80], "pool 0.5": [81]})
    first, second = write_report([root], tmp_path / "1.html"), write_report([root], tmp_path / "2.html")
    assert first.read_bytes() == second.read_bytes()


def test_figures_show_the_best_of_many_arms(tmp_path: Path) -> None:
    root = make_arms(tmp_path, {"no mask": [50], **{f"arm {i}": [60.0 + i] for i in range(15)}})
    page = Page(write_report([root]))
    assert "the 12 best of 16 arms" in page.text
    assert page.tags.count("line") == 12 + 12 + 11  # colours in the table, above the curves, above the masks


def test_diverged_loss_leaves_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epoch": 2.5, "phase": "train", "loss": NaN}\n')
    assert "Learning curves" in Page(write_report([run])).text


def test_report_imports_no_torch() -> None:
    code = "import sys, gmscale.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_that_masks_layer_outputs_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", "")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["mask"] |= {"agreement": "consensus", "strength": None}
    config["output"] = {"enabled": True, "operator": "log", "strength": 0.25}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    touched = {"output": {"touched": [{"name": "act1", "entries": None}], "passed": ["act2", "act3"]}}
    (run / "touched.json").write_text(json.dumps(touched))
    page = Page(write_report([run]))
    assert "1 layer outputs, 2 pass through" in page.text
    assert "pool 1 consensus + output log 0.25" in page.text
