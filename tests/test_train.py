"""The training loop: exact resumption, skipped steps, orderly stops, one-line errors."""

import collections
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests import worn
from tests.configs import ROOT
from vtp_jax import train, tree
from vtp_jax.run import checkpoint, evaluations, metrics, stop
from vtp_jax.run.stop import Exit, Stopped
from vtp_jax.setup import build, cli, config
from vtp_jax.types import Mean, Method, Out, UserError

CONFIG = "configs/demo.py:tiny"
# Contrast alone: the loop is the same for every loss, and this one compiles in half the time.
CONTRAST = "--config.method.weights={'video': 0.0, 'text': 0.0, 'vtc': 1.0, 'vtm': 0.0}"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load():
    cfg = config.load(CONFIG, [CONTRAST])
    return cfg._replace(evals=dict(retrieval=cfg.evals["retrieval"]))


def one_weight(bad=(), value=np.nan):
    """A method of one weight, for what the loop does with any method: its loss is the brightness of
    the clips times the weight, and `value` times that at the steps `bad`."""

    def loss(params, extra, batch, rng, step):
        factor = jnp.where(jnp.isin(step, jnp.asarray(bad)), value, 1.0)
        bright = (batch["video"] / 255.0).mean(axis=(1, 2, 3, 4))
        found = Mean.of(params["w"] * factor * bright, batch["valid"])
        return found.value(), Out({"loss_w": found}, {"seen": extra["seen"] + 1})

    def video(params, extra, batch, rng=None):
        columns = batch["video"].mean(axis=(1, 2, 4))
        return {"embedding": params["w"] * columns[:, :8]}

    def text(params, extra, batch, rng=None):
        return {"embedding": params["w"] * batch["text"][:, :8]}

    return Method(
        init=lambda rng, spec: {"w": jnp.ones(())},
        loss=loss,
        encode=dict(video=video, text=text),
        start=lambda rng, spec, params: {"seen": jnp.zeros((), jnp.int32)},
    )


def with_one_weight(cfg, monkeypatch, method):
    """The config, for this method in place of its own."""
    monkeypatch.setattr(build, "method", lambda *_: method)
    cfg.optim["rules"] = [(".*", {})]
    return cfg._replace(sharding=[(".*", ())])


def go(workdir):
    return train.train(load()._replace(log=dict(every=1)), workdir)


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = metrics.read(path) if path.exists() else []
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def counted(workdir):
    """The counts of rows by step."""
    lines = metrics.read(workdir / "metrics.jsonl")
    return {x["step"]: tree.under(x, "data/") for x in lines if "data/rows" in x}


def params(workdir):
    return tree.flatten(checkpoint.restore_params(workdir))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run, and its last numbers."""
    workdir = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return workdir, go(workdir)
    finally:
        os.chdir(before)


def same(one, two):
    """Whether two runs had the same losses, and ended in the same parameters."""
    a, b = params(one), params(two)
    return losses(one) == losses(two) and all((a[name] == b[name]).all() for name in a)


def test_a_stopped_run_saves_and_resumes_exactly(tmp_path, whole, monkeypatch):
    show = metrics.Progress.show

    def stop(self, step, *rest):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return show(self, step, *rest)

    monkeypatch.setattr(metrics.Progress, "show", stop)
    with pytest.raises(Stopped) as stopped:
        go(tmp_path)
    assert (stopped.value.step, stopped.value.code) == (5, Exit.RESTART)
    assert max(losses(tmp_path)) == checkpoint.find_step(tmp_path) == 5
    # It resumes from the resolved config that the other run wrote: plain data, the same run.
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    train.main(["--config", str(whole[0] / "config.json"), "--workdir", str(tmp_path)])
    assert same(tmp_path, whole[0])
    rows, of_whole = (counted(x) for x in (tmp_path, whole[0]))
    assert rows == of_whole  # of both parts together
    assert (rows[12]["rows"], rows[12]["failed"]) == (12 * 16, 0)
    first, second = (json.loads((x / "config.json").read_text()) for x in (tmp_path, whole[0]))
    assert first == second


@pytest.mark.parametrize(
    "sent, code, by",
    [(signal.SIGTERM, Exit.RESTART, "SIGTERM"), (signal.SIGINT, Exit.INTERRUPTED, "Ctrl-C")],
)
def test_a_stop_says_what_is_saved_and_how_to_go_on(sent, code, by, tmp_path, monkeypatch, capfd):
    """It has an exit status of its own, and the handlers from before are back afterwards."""
    step = itertools.count()
    monkeypatch.setattr(metrics, "merge", tripped(metrics.merge, lambda: next(step) == 2, sent))
    cfg = with_one_weight(load(), monkeypatch, one_weight())._replace(log=dict(every=1))
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda argv: train.train(cfg, tmp_path))
    assert ended.value.code == code
    told = capfd.readouterr().err.splitlines()
    assert f"stopped by {by}: saved step 3 of {cfg.steps}; the same command goes on" in told[-1]
    assert checkpoint.find_step(tmp_path) == 3
    assert before == [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    assert train.train(cfg, tmp_path)["train/loss"] is not None
    assert checkpoint.find_step(tmp_path) == cfg.steps


def test_a_run_says_what_it_does_and_shows_its_first_loss_at_once(tmp_path, monkeypatch, capsys):
    cfg = with_one_weight(load(), monkeypatch, one_weight())._replace(evals={}, steps=5)
    train.train(cfg._replace(log=dict(every=4)), tmp_path)
    *parts, begun, compiling, compiled, first, fourth, last = capsys.readouterr().out.splitlines()
    assert len(parts) == 6 and all(line.endswith(" ...") for line in parts)
    assert "M parameters on 8 cpu devices, JAX" in begun and "step 0 of 5" in begun
    assert compiling == "compiling the training step ..." and compiled.startswith("compiled in ")
    assert first.startswith("step 1: loss 0.")
    assert fourth.startswith("step 4/5 ") and last.startswith("step 5/5 ")
    assert sorted(losses(tmp_path)) == [4, 5]


def test_the_step_is_traced_once(tmp_path, monkeypatch):
    """By the check before anything compiles, whose trace the loop uses."""
    method, traced = one_weight(), []

    def loss(*args):
        traced.append(len(args))
        return method.loss(*args)

    cfg = with_one_weight(load(), monkeypatch, method._replace(loss=loss))
    train.train(cfg._replace(evals={}, steps=3), tmp_path)
    assert len(traced) == 1


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stop, "end", sys.exit)
    step = itertools.count()
    tripping = tripped(metrics.merge, lambda: next(step) == 2, signal.SIGINT, 2)
    monkeypatch.setattr(metrics, "merge", tripping)
    cfg = with_one_weight(load(), monkeypatch, one_weight())._replace(log=dict(every=1))
    with pytest.raises(SystemExit) as ended:
        train.train(cfg, tmp_path)
    assert ended.value.code == Exit.INTERRUPTED and not kept(tmp_path)
    assert "goes on from the newest checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize(
    "sent, code, by",
    [(signal.SIGTERM, Exit.RESTART, "SIGTERM"), (signal.SIGINT, Exit.INTERRUPTED, "Ctrl-C")],
)
def test_before_its_first_step_a_run_ends_at_once_and_says_what_there_is(
    sent, code, by, tmp_path, monkeypatch, capfd
):
    """From the choice of values to the compilation, of a new run and of one that is resumed."""
    cfg = with_one_weight(load(), monkeypatch, one_weight())
    cfg = cfg._replace(evals={}, steps=4, log=dict(every=1))
    monkeypatch.setattr(config, "load", lambda *_: cfg)
    monkeypatch.setattr(stop, "end", sys.exit)

    def ends(module, name):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, tripped(getattr(module, name), lambda: True, sent))
            with pytest.raises(SystemExit) as ended:
                train.main(["--config", CONFIG, "--workdir", str(tmp_path)])
        assert ended.value.code == code
        told = capfd.readouterr().err.splitlines()[-1]
        assert told.startswith(f"stopped by {by}: ")
        return told

    for place in ((config, "load"), (build, "prepare"), (checkpoint.Checkpoints, "restore_latest")):
        assert "nothing new was trained; the same command starts it again" in ends(*place)
    begun = ((train, "write_config"), (train, "make_state"), (stop, "aside"))
    for place in begun:
        assert "no step of 4 is saved; the same command starts it" in ends(*place)
    train.train(cfg, tmp_path)
    cfg = cfg._replace(steps=6)
    for place in (begun[0], begun[2]):
        assert "saved step 4 of 6; the same command goes on from there" in ends(*place)
    assert kept(tmp_path) == 4


def tripped(function, when, sent, times=1):
    """The function, which sends this process a signal before it does its work."""

    def f(*args):
        if when():
            for _ in range(times):
                os.kill(os.getpid(), sent)
        return function(*args)

    return f


def start(workdir, steps):
    """A process that trains on one device; what it prints as errors goes to WORKDIR.txt."""
    command = [sys.executable, "-m", "vtp_jax.train", "--config", CONFIG, "--workdir", str(workdir)]
    changes = dict(steps=steps, batch=8, checkpoint__every=10, log__every=1)
    changes |= dict(optim__lr__steps=12, optim__lr__warmup=4)  # or they would follow `steps`
    command += [f"--config.{name.replace('__', '.')}={x}" for name, x in changes.items()]
    command += [CONTRAST, "--config.evals={}", "--config.data.evals={}"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    with errors(workdir).open("w") as file:
        pipes = dict(stdout=subprocess.DEVNULL, stderr=file)
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, **pipes)


def errors(workdir):
    return workdir.with_suffix(".txt")


def kept(workdir):
    """The step of the newest complete checkpoint; 0 if there is none yet."""
    try:
        return checkpoint.find_step(workdir)
    except UserError:
        return 0


def test_a_killed_process_resumes_from_its_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(parts, 1_000_000)  # it does not end by itself
    try:
        until = time.monotonic() + 600
        while not kept(parts):
            running = process.poll() is None and time.monotonic() < until
            assert running, errors(parts).read_text()
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    stopped = max(losses(parts))
    assert 0 < kept(parts) <= stopped
    for workdir in (parts, whole):
        assert start(workdir, stopped + 10).wait() == 0, errors(workdir).read_text()
    assert same(whole, parts)


def check_reported(last, bad, epochs):
    counted = tree.under(last, "data/")
    counted = {k: n for k, n in counted.items() if k == "rows" or k.startswith("failed")}
    causes = {f"failed/{k}": epochs * n for k, n in collections.Counter(bad.values()).items()}
    assert counted == dict(rows=epochs * worn.CLIPS, failed=epochs * len(bad), **causes)


def test_training_completes_on_a_partly_damaged_corpus(tmp_path, monkeypatch):
    """One file in twenty is damaged; the report of them is exact, and the same for two runs."""
    root = worn.write(tmp_path / "videos", side=64, frames=16)
    source = dict(root=str(root), list=str(root / "train.csv"), max_absent=0.05)
    cfg = load()
    cfg.data.update(kind="files", train=source, evals={})
    cfg = with_one_weight(cfg, monkeypatch, one_weight())
    cfg = cfg._replace(evals={}, steps=10, log=dict(every=1))  # an epoch
    for run in ("one", "two"):
        last = train.train(cfg, tmp_path / run)
        check_reported(last, worn.DAMAGE, 1)
        assert len(losses(tmp_path / run)) == 10 and last["train/skipped"] == 0
    assert same(tmp_path / "one", tmp_path / "two")


def test_damaged_shards_do_not_stop_a_run(tmp_path, monkeypatch):
    """Neither unreadable headers nor missing shards do."""
    root = worn.write_shards(tmp_path, side=64, frames=16)
    cfg = with_one_weight(load(), monkeypatch, one_weight())
    cfg.data.update(kind="shards", train=dict(root=str(root)), evals={}, max_failed=0.2)
    cfg = cfg._replace(evals={}, steps=20, log=dict(every=1))
    last = train.train(cfg, tmp_path / "run")
    check_reported(last, worn.SHARDS, 2)


def test_too_many_skipped_steps_stop_the_run(tmp_path, monkeypatch):
    cfg = with_one_weight(load(), monkeypatch, one_weight(range(2, 100), np.nan))
    cfg = cfg._replace(evals={}, log=dict(every=1, max_skipped=3), steps=30)
    with pytest.raises(UserError, match="4 steps in a row .* not finite"):
        train.train(cfg, tmp_path)


def test_means_exclude_skipped_steps():
    def one(loss, skipped):
        return {
            "loss": Mean(np.float32(loss), np.float32(1)),
            "skipped": Mean(np.float32(skipped), np.float32(1)),
        }

    found = metrics.merge([one(1.0, 0), one(np.nan, 1), one(3.0, 0)])
    assert found["loss"] == 2.0 and abs(found["skipped"] - 1 / 3) < 1e-6


def test_another_net_in_the_same_workdir_is_rejected(whole):
    cfg = load()
    cfg.method["size"] = (128, 1, 2, 128)
    before = (whole[0] / "config.json").read_text()
    with pytest.raises(UserError, match="does not fit"):
        train.train(cfg, whole[0])
    assert (whole[0] / "config.json").read_text() == before


def measured(workdir):
    """(step, numbers), of each evaluation."""
    lines = [(x["step"], tree.under(x, "eval/")) for x in metrics.read(workdir / "metrics.jsonl")]
    return [line for line in lines if line[1]]


def test_a_failing_evaluator_loses_no_step_and_no_number(tmp_path, monkeypatch):
    """At a step that is saved, and at the last one: the state is saved, and the missing numbers are
    measured when the run resumes."""
    cfg = with_one_weight(load(), monkeypatch, one_weight())
    cfg = cfg._replace(steps=4, log=dict(every=1))
    cfg.checkpoint.update(every=2, keep=1, best=("retrieval/t2v_mnr", "max"))
    cfg.evals["retrieval"]["every"] = 2
    made, failed = build.evaluators, set()

    def fails_once(*args):
        (every, check) = made(*args)["retrieval"]

        def run(state):
            if (step := int(state.step)) not in failed:
                failed.add(step)
                raise RuntimeError("out of memory")
            return check.run(state)

        return {"retrieval": (every, check._replace(run=run))}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(cfg, whole)
    monkeypatch.setattr(build, "evaluators", fails_once)
    for step in (2, 4):
        with pytest.raises(RuntimeError, match="out of memory"):
            train.train(cfg, parts)
        assert checkpoint.find_step(parts) == step
    last = train.train(cfg, parts)
    assert same(whole, parts) and measured(whole) == measured(parts)
    assert [step for step, _ in measured(parts)] == [2, 4]
    assert tree.under(last, "eval/") == measured(parts)[-1][1]
    best = checkpoint.find_step(whole, "best")
    assert best == checkpoint.find_step(parts, "best")
    one, two = (checkpoint.read_meta(run, best).metrics for run in (whole, parts))
    assert one == two and one
    assert train.train(cfg, parts) == {}  # it is done, and measured
    assert measured(whole) == measured(parts)


@pytest.mark.parametrize(
    "kind, lacks, message",
    [
        ("probe", (), "probe: encode 'video' gives no 'embedding'"),  # the task dropped its norm
        ("classify", ("label",), "classify: stream 'test' has no 'label'"),
        ("retrieval", (), "retrieval: the method has no encode 'text'"),
        ("caption", (), "caption: no stream 'test/captions'"),
    ],
)
def test_an_evaluators_mistake_is_reported_before_anything_is_written(
    kind, lacks, message, tmp_path
):
    """That is, before the state is made, which is the first thing that compiles."""
    cfg = config.load("configs/videomae/finetune_k400.py:tiny")
    cfg = cfg._replace(evals=dict(a=dict(type=kind, stream="test")))
    for key in lacks:
        del cfg.data["evals"]["test"][key]
    with pytest.raises(UserError, match=message) as error:
        train.train(cfg, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_rows_that_are_read_are_those_of_the_whole_run(tmp_path):
    """Also those between the last logged step and the saved one, and of causes seen only before."""
    one = dict(loss=Mean(1.0, 1.0), skipped=Mean(0.0, 1.0))

    def part(first, steps, saved, **failed):
        """Logs every two steps and saves at one of them; a step reads 4 rows, of which one may
        fail."""
        out = io.StringIO()
        with (
            metrics.Writer(tmp_path, first) as writer,
            metrics.Progress(9, rows=4, out=out) as progress,
        ):
            report = train.Report(writer, progress, 20)
            for done in range(first + 1, steps + 1):
                counts = dict(
                    rows=4 * (done - first), **{k: n * (done > 2) for k, n in failed.items()}
                )
                report.took(one)
                if done % 2 == 0 or done == saved:
                    report.trained(done, 0.0, counts)

    part(0, 4, 3, failed=2)  # killed after step 4; that of step 3 was saved
    part(3, 8, 0)
    assert counted(tmp_path)[8] == dict(rows=32, failed=2)


def test_evaluate_reads_what_train_wrote(tmp_path, whole, capsys):
    from vtp_jax import evaluate

    workdir, last = whole
    capsys.readouterr()
    evaluate.main(["--workdir", str(workdir)])
    *trained, found = evaluations.read(workdir)
    assert [(one.step, one.by) for one in trained] == [(6, "training"), (12, "training")]
    assert (found.step, found.by) == (12, "vtp evaluate")
    for name, value in found.numbers.items():
        np.testing.assert_allclose(value, last[f"eval/retrieval/{name}"], rtol=1e-5)
    # The same set by the same rule: two numbers that may be compared.
    assert all(one.subject == found.subject for one in trained)
    assert "Ties" in (said := capsys.readouterr().out) and found.subject.protocol in said
    # Another set: beside the first, with a protocol of its own.
    with pytest.raises(UserError, match="no evaluator 'retrievl'; did you mean 'retrieval'"):
        evaluate.main(["--workdir", str(workdir), "--only", "retrievl"])
    other = ["--config.data.evals.other.clips=8", "--config.evals.retrieval.stream=other"]
    evaluate.main(["--workdir", str(workdir), "--only", "retrieval", *other])
    *before, added = evaluations.read(workdir)
    assert before == [*trained, found] and added.subject.stream == "other"
    assert "8 videos of 'other'" in added.subject.protocol and added.numbers["n_videos"] == 8
    with pytest.raises(UserError, match="no run in"):
        evaluate.main(["--workdir", str(tmp_path / "nothing")])
