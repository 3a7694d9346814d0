"""A workdir in a bucket: a run there equals a run on a disk, and only one run writes at a time."""

import time

import numpy as np
import pytest
from commands import OFTEN, signalled_at, train
from gcs import bucket_server
from test_train import assert_same_run

from alexnet_jax import convert, evaluate, export, inference, plan, visualize
from alexnet_jax.utils import buckets
from alexnet_jax.utils.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError

URL = "gs://bucket/runs/here"


@pytest.fixture
def objects(monkeypatch, tmp_path):
    """The objects of a bucket. Local copies go to tmp_path/copies."""
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    monkeypatch.setenv("TMPDIR", str(copies))
    with bucket_server() as (objects, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield objects


@pytest.fixture
def quick(monkeypatch):
    """Copies and renews locks often."""
    monkeypatch.setattr(buckets, "COPY_EVERY_S", 0.05)
    monkeypatch.setattr(buckets, "LOCK_EXPIRES_S", 1.0)


def under(objects, prefix):
    prefix = f"runs/here/{prefix}"
    return {name.removeprefix(prefix) for name in objects if name.startswith(prefix)}


def test_run_in_a_bucket_is_stopped_and_continues_like_one_on_a_disk(
    objects, undisturbed, digits, tmp_path, monkeypatch
):
    stopped = signalled_at(digits, URL, "step     10", 15, *OFTEN)
    assert stopped.returncode == EXIT_STOPPED, stopped.output
    assert not any((tmp_path / "copies").iterdir())
    done = train(digits, URL, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 1" in done.stdout
    files = {"config.json", "metrics.jsonl", "summary.txt", "statistics.npz"}
    assert files | {"samples.png", "curves.png", "filters.png"} <= under(objects, "")
    assert any(name.startswith("events") for name in under(objects, "tensorboard/"))
    assert ".lock" not in under(objects, "")
    assert_same_run(buckets.readable(URL), undisturbed[0])

    # Other commands read it, and write to the current folder.
    network, expected = inference.load(URL), inference.load(undisturbed[0])
    np.testing.assert_array_equal(
        network.variables["params"]["fc8"]["kernel"], expected.variables["params"]["fc8"]["kernel"]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        visualize.main(["filters", URL])
    assert not exited.value.code
    assert (tmp_path / "filters.png").is_file()


@pytest.mark.long
def test_killed_run_resumes_when_its_lock_expires(objects, undisturbed, digits):
    signalled_at(digits, URL, "step     37", 9, *OFTEN)
    assert ".lock" in under(objects, "")
    done = train(digits, URL, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert "has the lock of another run; waiting 40 s" in done.stdout
    assert_same_run(buckets.readable(URL), undisturbed[0])


def test_second_run_is_rejected_while_the_first_one_runs(objects, quick):
    with buckets.local_copy(URL) as folder:
        (folder / "config.json").write_text("{}")
        with (
            pytest.raises(UserError, match=f"another process is training in {URL}"),
            buckets.local_copy(URL),
        ):
            pass
    assert under(objects, "") == {"config.json"}


def test_abandoned_lock_is_taken_over(objects, quick, capsys):
    objects["runs/here/.lock"] = b"host of a killed run"
    with buckets.local_copy(URL) as folder:
        (folder / "file").write_text("x")
    assert "waiting 1 s" in capsys.readouterr().out
    assert under(objects, "") == {"file"}


def test_changes_and_complete_checkpoints_are_copied(objects, quick):
    def write(folder, name, text=""):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def wait_until(condition):
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until, sorted(objects)
            time.sleep(0.05)

    with buckets.local_copy(URL) as folder:
        write(folder, "metrics.jsonl", "1")
        write(folder, "checkpoints/1/state/w", "one")
        write(folder, "checkpoints/2.orbax-checkpoint-tmp/state/w", "t")
        wait_until(lambda: "checkpoints/1/.part_0_of_1" in under(objects, ""))
        write(folder, "metrics.jsonl", "1 2")
        (folder / "checkpoints" / "2.orbax-checkpoint-tmp").rename(folder / "checkpoints" / "2")
        (folder / "checkpoints" / "1" / "state" / "w").unlink()
        (folder / "checkpoints" / "1" / "state").rmdir()
        (folder / "checkpoints" / "1").rmdir()
        wait_until(lambda: not under(objects, "checkpoints/1/"))
    ours = {"checkpoints/2/.begun", "checkpoints/2/.part_0_of_1"}
    assert under(objects, "") == {"metrics.jsonl", "checkpoints/2/state/w", *ours}
    assert objects["runs/here/metrics.jsonl"] == b"1 2"


def test_unfinished_checkpoint_in_the_bucket_is_not_used(objects, quick):
    """Process 1 of two was killed before it had copied its part of step 7."""
    names = ("state/a", ".begun", ".part_0_of_2", ".part_1_of_2")
    for name in (*(f"5/{name}" for name in names), *(f"7/{name}" for name in names[:3])):
        objects[f"runs/here/checkpoints/{name}"] = b""
    folder = buckets.readable(URL)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["5"]
    with buckets.local_copy(URL) as folder:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["5"]
    assert not under(objects, "checkpoints/7/")


WRITERS = [
    (visualize.main, ["network", "--config=quickstart", "--out=gs://bucket/x.png"]),
    (visualize.main, ["data", "--config=quickstart", "--workdir=gs://bucket/run"]),
    (evaluate.main, ["runs/quickstart", "--out=gs://bucket/x"]),
    (export.main, ["runs/quickstart", "gs://bucket/x.onnx"]),
    (convert.main, ["weights.pth", "gs://bucket/run"]),
    (plan.main, ["--config=quickstart", "--workdir=gs://bucket/plan", "--topology=v5e:2x2"]),
]


@pytest.mark.parametrize(("command", "argv"), WRITERS)
def test_other_commands_do_not_write_to_buckets(command, argv, capsys):
    with pytest.raises(SystemExit) as exited:
        command(argv)
    assert exited.value.code == EXIT_USER_ERROR
    assert "cannot write to gs://bucket/" in capsys.readouterr().err


def test_workdir_that_was_copied_to_a_bucket_continues_there(objects, quick):
    for name in ("config.json", "checkpoints/7/state/a", "checkpoints/9/state/a"):
        objects[f"runs/here/{name}"] = b"x"
    with buckets.local_copy(URL) as folder:
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["7", "9"]
    assert under(objects, "checkpoints/") == {"7/state/a", "9/state/a"}


def test_bucket_without_access_is_reported_in_one_sentence(digits, tmp_path, monkeypatch):
    with bucket_server(refuses=True) as (_, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = train(digits, URL, *OFTEN)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert URL in line and "credentials" in line
    assert "Traceback" not in done.stderr
