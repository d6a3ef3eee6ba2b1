"""gmscale shards build: the same bytes however it runs, nothing lost in silence, one line for a mistake."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gmscale.data.tars.writer import write_shard
from gmscale.errors import RunError, UsageError
from gmscale.shards.commands import main
from gmscale.shards.journal import locked
from gmscale.shards.layout import Layout
from gmscale.shards.processes import spread

# timm and webdataset are imported where they are used: the processes of one test import this module.

CLASSES = ("ant", "bee", "wild cat")
PER_CLASS = 8
Sample = dict[str, str | bytes]


def picture(number: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (24, 18)) -> bytes:
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of images: three classes of eight."""
    for place, name in enumerate(CLASSES):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            path = tmp_path / "source" / name / f"{number}.JPEG"
            path.write_bytes(picture(place * PER_CLASS + number))
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "set"


def build(source: Path | str, out: Path, *options: str) -> None:
    workers = () if "--workers" in options else ("--workers", "0")
    assert main(["build", str(source), str(out), *options, *workers]) == 0


def content(out: Path) -> dict[str, bytes]:
    """All that a build leaves, but for the index, which holds times."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith("_index")}


def samples(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob(f"*-{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def sources(out: Path, split: str = "train") -> dict[str, str]:
    lines = (out / f"_sources-{split}.txt").read_text().splitlines()
    return dict(tuple(line.split("\t")) for line in lines)  # type: ignore[misc]


# ---- one shard --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["jpg", "cls", "json", "seg.png"]), st.binary(max_size=2000)),
        max_size=5,
    )
)
def test_a_shard_has_the_bytes_that_webdataset_writes(parts: list[dict[str, bytes]]) -> None:
    shard: list[Sample] = [{"__key__": f"{number:07}", **part} for number, part in enumerate(parts)]
    import webdataset

    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for sample in shard:
            writer.write(sample)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"gmscale-test-{os.getpid()}.tar"
    try:
        stats = write_shard(path, shard)
        assert path.read_bytes() == buffer.getvalue()
        assert (stats.count, stats.bytes) == (len(shard), len(buffer.getvalue()))
    finally:
        path.unlink(missing_ok=True)


def test_a_shard_is_complete_or_absent(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield {"__key__": "0", "jpg": b"x" * 10**6}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_sample_has_one_place(count: int, samples_per_shard: int, seed: int) -> None:
    layout = Layout("a-train", count, samples_per_shard, seed)
    shards = list(layout)
    assert sorted(np.concatenate([shard.samples for shard in shards])) == list(range(count))
    lengths = [len(shard.samples) for shard in shards]
    assert max(lengths) <= samples_per_shard
    assert max(lengths) - min(lengths) <= 1
    keys = [key for shard in shards for key in shard.keys]
    assert keys == sorted(set(keys))
    assert len(keys) == count
    assert layout.names == sorted({shard.name for shard in shards})


# ---- a folder of images -----------------------------------------------------------------------------------------


def test_timm_reads_every_image_with_its_class(source: Path, out: Path) -> None:
    import timm.data

    build(source, out, "--samples_per_shard", "10")
    found, paths = samples(out), sources(out)
    assert sorted(paths.values()) == sorted(f"{name}/{i}.JPEG" for name in CLASSES for i in range(PER_CLASS))
    for key, path in paths.items():
        assert found[key] == {
            "jpg": (source / path).read_bytes(),
            "cls": str(CLASSES.index(path.split("/")[0])).encode(),
        }
    dataset = timm.data.create_dataset("wds/set", root=str(out), split="train", is_training=False)
    assert len(dataset) == len(CLASSES) * PER_CLASS
    assert [label for _, label in dataset] == [int(found[key]["cls"]) for key in paths]
    info = json.loads((out / "_info.json").read_text())
    assert info["class_to_idx"] == {name: i for i, name in enumerate(CLASSES)}
    assert info["splits"]["train"]["bytes"] == [path.stat().st_size for path in sorted(out.glob("*.tar"))]
    # Well mixed: no shard of eight has one class alone.
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len({found[member.name.partition(".")[0]]["cls"] for member in tar}) > 1


def test_the_bytes_depend_neither_on_workers_nor_on_umask(source: Path, tmp_path: Path) -> None:
    places = [tmp_path / str(workers) / "set" for workers in (0, 1, 3)]
    for place, workers in zip(places, ("0", "1", "3"), strict=True):
        before = os.umask(0o077 if workers == "1" else 0o022)
        try:
            build(source, place, "--workers", workers, "--samples_per_shard", "4", "--format", "png")
        finally:
            os.umask(before)
    assert content(places[0]) == content(places[1]) == content(places[2])
    build(source, tmp_path / "other", "--seed", "1", "--name", "set")
    assert list(sources(tmp_path / "other").values()) != list(sources(places[0]).values())


def test_splits_share_the_classes_of_the_first(source: Path, tmp_path: Path, out: Path) -> None:
    build(source, out)
    (tmp_path / "all" / "val" / "wild cat").mkdir(parents=True)
    (tmp_path / "all" / "val" / "wild cat" / "x.jpg").write_bytes(picture(99))
    build(tmp_path / "all", out, "--split", "val")
    assert samples(out, "val")["0000000"]["cls"] == b"2"
    assert set(json.loads((out / "_info.json").read_text())["splits"]) == {"train", "val"}
    (tmp_path / "all" / "val" / "wild cats").mkdir()
    with pytest.raises(UsageError, match=r"unknown class 'wild cats'.*did you mean 'wild cat'"):
        build(tmp_path / "all" / "val", out, "--split", "val2")
    with pytest.raises(UsageError, match="holds val/ but no validation/"):
        build(tmp_path / "all", tmp_path / "new", "--split", "validation")
    assert not (tmp_path / "new").exists()


def test_classes_can_be_pinned(source: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "classes.txt").write_text("wild cat\n\nyak\nbee\nant\n")
    build(source, out, "--classes", str(tmp_path / "classes.txt"))
    found = samples(out)
    order = ["wild cat", "yak", "bee", "ant"]
    for key, path in sources(out).items():
        assert int(found[key]["cls"]) == order.index(path.split("/")[0])


def test_what_is_no_image_is_counted_and_links_are_followed(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "ant" / "deep").mkdir()
    (source / "ant" / "deep" / "link.jpg").symlink_to(source / "bee" / "0.JPEG")
    for name in ("ant/notes.txt", "bee/.DS_Store", "top.jpg"):
        (source / name).write_bytes(b"x")
    os.mkfifo(source / "bee" / "pipe.jpg")
    (source / "empty").mkdir()
    build(source, out)
    said = capsys.readouterr().out
    for words in ("1 .txt", "1 hidden", "1 outside of the class directories", "1 no file", "1 of 4 (empty)"):
        assert words in said
    assert "ant/deep/link.jpg" in sources(out).values()
    (source / "ant" / "deep" / "up").symlink_to(source / "ant")
    with pytest.raises(UsageError, match="link to a directory above it"):
        build(source, out, "--split", "again")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("v.csv", "file,class\n{0}.JPEG,ant\n{1}.JPEG,bee\n"),
        ("v.tsv", "{0}.JPEG\tant\n{1}.JPEG\tbee\n"),
        ("v.txt", "{0}.JPEG 0\n{1}.JPEG 1\n"),
        ("v.csv", 'ImageId,PredictionString\n{0},ant 1 2 3 4 bee 1 2 3 4\n{1},"bee 5 6 7 8"\n'),
    ],
)
def test_a_table_gives_the_classes_of_flat_images(
    source: Path, tmp_path: Path, out: Path, name: str, rows: str
) -> None:
    build(source, out)
    (tmp_path / name).write_text(rows.format(3, 5))
    build(source / "ant", out, "--split", "val", "--labels", str(tmp_path / name))
    found = samples(out, "val")
    assert {path: found[key]["cls"] for key, path in sources(out, "val").items()} == {
        "3.JPEG": b"0",
        "5.JPEG": b"1",
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("x.jpg,ant\n", "none of its 1 files, such as x.jpg, is in"),
        ("3.JPEG,ant\n3.JPEG,bee\n", "line 2: 3.JPEG has a line already"),
        ("3.JPEG,ant,bee\n", "line 1: '3.JPEG,ant,bee'; expected FILE and CLASS"),
        ("3.JPEG,3\n", "unknown class '3'"),
        ("3.JPEG,nat\n", "did you mean 'ant'"),
    ],
)
def test_a_faulty_table_is_named(source: Path, tmp_path: Path, out: Path, rows: str, said: str) -> None:
    build(source, out)
    (tmp_path / "v.csv").write_text(rows)
    with pytest.raises(UsageError, match="v.csv.*" + said.replace(".", r"\.")):
        build(source / "ant", out, "--split", "val", "--labels", str(tmp_path / "v.csv"))


# ---- bad images, other formats ----------------------------------------------------------------------------------


def test_a_bad_image_stops_the_build_or_is_left_out(source: Path, out: Path) -> None:
    whole = (source / "ant" / "0.JPEG").read_bytes()
    (source / "ant" / "1.JPEG").write_bytes(whole[: len(whole) // 2])
    (source / "bee" / "2.JPEG").write_bytes(b"<html>404</html>")
    (source / "bee" / "3.JPEG").write_bytes(b"")
    (source / "bee" / "4.JPEG").unlink()
    (source / "bee" / "4.JPEG").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"\.JPEG: .*; --on_bad skip leaves such images out") as caught:
        build(source, out, "--samples_per_shard", "2")
    assert "\n" not in str(caught.value)
    complete = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    build(source, out, "--samples_per_shard", "2", "--on_bad", "skip")
    assert complete.items() <= content(out).items()
    skipped = [line.split("\t") for line in (out / "_skipped-train.txt").read_text().splitlines()]
    assert sorted(line[:2] for line in skipped) == [
        ["ant/1.JPEG", "corrupt image"],
        ["bee/2.JPEG", "corrupt image"],
        ["bee/3.JPEG", "empty image"],
        ["bee/4.JPEG", "no image"],
    ]
    assert len(samples(out)) == len(sources(out)) == len(CLASSES) * PER_CLASS - 4
    assert json.loads((out / "_info.json").read_text())["splits"]["train"]["num_samples"] == len(samples(out))
    # Shards that were made without some images are not what a strict build wants.
    with pytest.raises(RunError, match="--on_bad skip"):
        build(source, out, "--samples_per_shard", "2")


def test_the_extension_follows_from_the_content(source: Path, out: Path) -> None:
    (source / "ant" / "0.JPEG").write_bytes(picture(0, "PNG"))
    (source / "ant" / "1.JPEG").write_bytes(picture(1, "WEBP"))
    (source / "ant" / "2.JPEG").write_bytes(picture(2, mode="CMYK"))
    build(source, out)
    found = samples(out)
    kinds = {path: (found[key].keys() - {"cls"}).pop() for key, path in sources(out).items()}
    assert [kinds[f"ant/{i}.JPEG"] for i in range(4)] == ["png", "webp", "jpg", "jpg"]
    (four_inks,) = (found[key]["jpg"] for key, path in sources(out).items() if path == "ant/2.JPEG")
    assert four_inks == (source / "ant" / "2.JPEG").read_bytes()


def test_images_are_encoded_anew_only_where_asked(source: Path, out: Path) -> None:
    (source / "ant" / "0.JPEG").write_bytes(picture(0, size=(40, 60)))
    (source / "ant" / "1.JPEG").write_bytes(picture(1, "PNG", "P", size=(100, 20)))
    (source / "ant" / "2.JPEG").write_bytes(picture(2, mode="CMYK", size=(25, 50)))
    build(source, out, "--resize", "20")
    found, key_of = samples(out), {path: key for key, path in sources(out).items()}
    for name, extension, size, mode in (
        ("0", "jpg", (20, 30), "RGB"),
        ("1", "png", (100, 20), "P"),
        ("2", "jpg", (20, 40), "RGB"),
    ):
        image = Image.open(io.BytesIO(found[key_of[f"ant/{name}.JPEG"]][extension]))
        assert (image.size, image.mode) == (size, mode)
    assert found[key_of["bee/1.JPEG"]]["jpg"] == (source / "bee" / "1.JPEG").read_bytes()
    build(source, out, "--split", "webp", "--format", "webp", "--quality", "60")
    assert {tuple(sample) for sample in samples(out, "webp").values()} == {("cls", "webp")}


def test_a_header_check_does_not_decode(source: Path, out: Path) -> None:
    path = source / "ant" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    build(source, out, "--check", "header")
    assert len(samples(out)) == len(CLASSES) * PER_CLASS


# ---- other shards -----------------------------------------------------------------------------------------------


def test_shards_are_divided_anew_with_all_that_their_samples_hold(tmp_path: Path, out: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    given: list[Sample] = [
        {
            "__key__": f"{'long' * 20 if i == 3 else ''}{i:04}",
            "jpg": picture(i),
            "cls": str(i % 3),
            "json": json.dumps({"number": i}),
            "seg.png": bytes([i]),
        }
        for i in range(12)
    ]
    for shard in range(3):
        write_shard(first / f"a-{shard}.tar", given[4 * shard : 4 * shard + 4])
    build(first / "a-{0..2}.tar", out, "--samples_per_shard", "5")
    found, expected = (
        samples(out),
        {f"a-{i // 4}.tar/{sample['__key__']}": sample for i, sample in enumerate(given)},
    )
    for key, name in sources(out).items():
        for extension, data in found[key].items():
            original = expected[name][extension]
            assert data == (original.encode() if isinstance(original, str) else original)
        assert len(found[key]) == 4
    assert len(found) == 12

    # Once more, as a set with _info.json and with its classes in an order of its own.
    (tmp_path / "classes.txt").write_text("2\n1\n0\n")
    build(out, tmp_path / "again", "--classes", str(tmp_path / "classes.txt"))
    again = samples(tmp_path / "again")
    assert {int(json.loads(s["json"])["number"]) % 3 + int(s["cls"]) for s in again.values()} == {2}
    with pytest.raises(UsageError, match="is where the shards of SOURCE are"):
        build(out, out)


def test_bad_samples_of_shards_are_treated_as_bad_images(tmp_path: Path, out: Path) -> None:
    good: Sample = {"__key__": "good", "jpg": picture(0), "cls": "0"}
    write_shard(tmp_path / "a-0.tar", [good, {"__key__": "bad", "jpg": picture(1)}])
    with pytest.raises(RunError, match=r"a-0\.tar/bad: no label"):
        build(tmp_path / "a-0.tar", out)
    build(tmp_path / "a-0.tar", out, "--on_bad", "skip")
    assert len(samples(out)) == 1


# ---- interruptions ----------------------------------------------------------------------------------------------

# `gmscale shards build`, but that it hands out so many shards and no more, and waits to be interrupted.
PAUSING = """
import signal, sys, time
from itertools import islice
from gmscale import cli
from gmscale.shards import build

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored

def first(tasks, count):
    yield from islice(tasks, count)
    while True:  # a pause would miss a signal that comes just before it
        time.sleep(0.01)

spread, count = build.spread, int(sys.argv[1])
build.spread = lambda work, tasks, workers: spread(work, first(tasks, count), workers)
cli.main(["shards", "build", *sys.argv[2:]])
"""


def start_and_signal(arguments: list[str], out: Path, shards: int, number: int) -> subprocess.CompletedProcess[str]:
    """Run the command in a session of its own until so many shards are complete, then signal its main process."""
    handed_out = str(shards - len(list(out.glob("*.tar"))) + 1)  # the last of them may never be complete
    with subprocess.Popen(
        [sys.executable, "-c", PAUSING, handed_out, *arguments],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        said, error = process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while processes_of(process.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)
    return subprocess.CompletedProcess(arguments, process.returncode, said, error)


def processes_of(session: int) -> list[str]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if its_session == str(session) and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupted_build_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, out: Path) -> None:
    for number in range(50):
        (source / "bee" / f"more{number}.JPEG").hardlink_to(source / "bee" / "1.JPEG")
    arguments = [str(source), str(out), "--samples_per_shard", "2", "--workers", "2"]
    for shards, number, status in ((3, signal.SIGTERM, 143), (10, signal.SIGINT, 130), (20, signal.SIGKILL, -9)):
        ended = start_and_signal(arguments, out, shards, number)
        assert ended.returncode == status, ended.stderr
        assert not (out / "_info.json").exists()
        if number != signal.SIGKILL:
            assert ended.stderr == f"gmscale shards build: stopped; the same command goes on with {out}\n"
            assert not list(out.glob(".*.tmp"))
        complete = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / ".set-train-0009.tar.4194399.tmp").write_bytes(b"left over")
    journal = out / "_build-train.jsonl"
    noted = {json.loads(line)["shard"] for line in journal.read_text().splitlines()[1:]}
    with journal.open("a") as file:
        file.write('{"shard": "set-tra')  # the power went while this was being written
    build(*(Path(argument) for argument in arguments[:2]), *arguments[2:])
    assert len(noted) >= 18
    for name in noted:
        assert (out / name).stat().st_mtime_ns == complete[name]  # kept, not built again
    elsewhere = tmp_path / "elsewhere" / "set"
    build(source, elsewhere, "--samples_per_shard", "2")
    assert content(out) == content(elsewhere)


def ends_itself(task: int) -> Iterator[int]:
    yield task
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 3:
        raise ZeroDivisionError("three")


def test_a_worker_that_is_killed_or_fails_ends_the_work() -> None:
    assert sorted(spread(ends_itself, [0, 1, 4, 5], 2)) == [0, 1, 4, 5]
    with (
        pytest.raises(RunError, match=r"worker process was killed by SIGKILL.*start the command again"),
        closing(spread(ends_itself, [0, 1, 2, 4], 2)) as messages,
    ):
        list(messages)
    with pytest.raises(ZeroDivisionError) as caught:
        list(spread(ends_itself, [3], 1))
    assert "ends_itself" in caught.value.__notes__[0]


def test_what_does_not_fit_on_the_disk_is_one_line(source: Path, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(RunError, match=r"File too large; complete shards stay, and the same command goes on"):
            build(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.tar")) + list(out.glob(".*.tmp"))
    build(source, out)


def test_another_plan_is_refused_and_so_is_a_second_build_at_once(source: Path, out: Path) -> None:
    build(source, out)
    before = content(out)
    build(source, out)
    assert content(out) == before
    with pytest.raises(UsageError, match=r"began with seed 0, this is 7; .* or remove _build-train\.jsonl"):
        build(source, out, "--seed", "7")
    (source / "bee" / "new.jpg").write_bytes(picture(77))
    with pytest.raises(UsageError, match="began with images 24, this is 25"):
        build(source, out)
    with locked(out), pytest.raises(UsageError, match=r"another build is writing there \(process \d+ on "):
        build(source, out, "--split", "val")
    assert content(out) == before


def test_shards_from_elsewhere_are_left_alone(source: Path, out: Path) -> None:
    build(source, out)
    (out / "_build-train.jsonl").unlink()
    with pytest.raises(UsageError, match="has a split 'train' from elsewhere"):
        build(source, out)
    (out / "_info.json").unlink()
    with pytest.raises(UsageError, match=r"set-train-0000\.tar exists, but no _build-train\.jsonl"):
        build(source, out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], r"arguments are required: SOURCE, OUT"),
        (["nowhere", "o"], "nowhere is not a directory"),
        (["{source}", "{source}"], "lies in the images"),
        (["{source}/ant", "o"], "has no class directories; images without them need --labels"),
        (["{source}", "o", "--split", "x.tar"], "timm needs a name without 'tar'"),
        (["{source}", "o", "--split", "a b"], "--split is 'a b'; expected letters"),
        (["{source}", "o", "--samples_per_shard", "0"], "--samples_per_shard is 0"),
        (["{source}", "o", "--format", "gif"], "--format: invalid choice: 'gif'"),
        (["{source}", "o", "--format", "png", "--quality", "50"], "--quality does nothing with --format png"),
        (["{source}", "o", "--classes", "nowhere"], "nowhere cannot be read"),
        (["{source}", "{source}/ant/0.JPEG/x"], "lies in the images"),
        (["{source}", "/proc/version/x"], "OUT /proc/version/x cannot be written"),
        (["https://a.b/c", "o"], "new shards are built from local ones only"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said) as caught:
        main(["build", *(option.replace("{source}", str(source)) for option in options)])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_workers_import_no_torch() -> None:
    code = (
        "import sys, gmscale.shards.build, gmscale.shards.check, gmscale.shards.commands\n"
        "assert not {'torch', 'timm', 'webdataset'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def labelled(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """Make images of those names, and a table of their classes."""
    folder.mkdir()
    for name, _ in rows:
        if "." in name:
            Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name, "PNG")
    table = folder.parent / "labels.csv"
    table.write_text("".join(f"{name},{label}\n" for name, label in rows))
    return table


def test_numbers_that_name_classes_stay_the_numbers_they_are(tmp_path: Path) -> None:
    table = labelled(tmp_path / "flat", [(f"{i:02}.png", str(i)) for i in range(12)])
    main(["build", str(tmp_path / "flat"), str(tmp_path / "out"), "--labels", str(table), "--workers", "0"])
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info["classes"] == [str(i) for i in range(12)]

    for i in range(12):
        (tmp_path / "folders" / str(i)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "folders" / str(i) / "a.png")
    main(["build", str(tmp_path / "folders"), str(tmp_path / "out2"), "--workers", "0"])
    assert json.loads((tmp_path / "out2" / "_info.json").read_text())["classes"] == info["classes"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a.png", "1"), ("b.png", "2")], "its classes are the numbers 1 to 2, without 0; expected 0, 1, 2"),
        ([("a.png", "0"), ("b.png", "2")], "without 1"),
        (
            [("a.png", "x"), ("a.jpg", "x"), ("a", "x")],
            r"line 3: a may be a\.jpg or a\.png; expected",
        ),
    ],
)
def test_a_table_that_could_mean_two_things_is_refused(
    tmp_path: Path, rows: list[tuple[str, str]], said: str
) -> None:
    table = labelled(tmp_path / "flat", rows)
    with pytest.raises(UsageError, match=said):
        main(["build", str(tmp_path / "flat"), str(tmp_path / "out"), "--labels", str(table)])
    assert not (tmp_path / "out").exists()


def test_a_first_row_is_no_heading_because_its_file_is_missing(tmp_path: Path) -> None:
    table = labelled(tmp_path / "flat", [("a.png", "x"), ("b.png", "y")])
    table.write_text("c,x\n" + table.read_text())
    with pytest.raises(RunError, match="c"):
        main(["build", str(tmp_path / "flat"), str(tmp_path / "out"), "--labels", str(table), "--workers", "0"])
    table.write_text("Image,Class\n" + table.read_text().removeprefix("c,x\n"))
    assert main(["build", str(tmp_path / "flat"), str(tmp_path / "out2"), "--labels", str(table)]) == 0


def test_directories_may_be_called_like_shards(tmp_path: Path, source: Path) -> None:
    main(["build", str(source), str(tmp_path / "my.tars"), "--name", "a", "--workers", "0"])
    assert main(["verify", str(tmp_path / "my.tars"), "--workers", "0"]) == 0
