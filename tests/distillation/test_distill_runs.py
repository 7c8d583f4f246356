"""Runs that are killed, cached, logged, spread over processes, or started from the command line."""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from faults import SmallDisk, Watch, assert_same, at, fail, kill
from processes import Started, command

from moesparse import demo
from moesparse.cli import main
from moesparse.cli.show import show_distilled as show
from moesparse.distillation import Settings, distill, distill_checkpoint
from moesparse.distillation import state as state_module
from moesparse.distillation.distributed import TrainingProcesses
from moesparse.distillation.matching import match
from moesparse.distillation.teacher import cache_bytes
from moesparse.errors import CheckpointError, MoESparseError, UsageError
from moesparse.experts.surgery import remove_experts
from moesparse.system.processes import join
from moesparse.testing import prune_by_magnitude, tiny_model

SETTINGS = Settings(learning_rate=3e-3, epochs=4, batch_size=4, micro_batch=2)


def windows(n=8, length=16, seed=0):
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def trained(mode, settings=SETTINGS, **options):
    """What a run finds, in this process."""
    student, teacher = prune_by_magnitude(tiny_model("mixtral")), tiny_model("mixtral")
    report = distill(student, teacher, windows(), mode, settings=settings, **options)
    sums = {name: float(tensor.double().abs().sum()) for name, tensor in student.state_dict().items()}
    return {"rows": report.rows, "weight": report.expert_weight, "zeros": report.zeros, "sums": sums}


def train(mode, state, slow):
    """In a process that may be killed; prints what it found."""

    def waiting(event):
        time.sleep(slow if event.done else 0)

    print(json.dumps(trained(mode, state=state, save_every=1, resume=True, progress=waiting)))


@pytest.mark.parametrize("mode", ["global", "blockwise"])
def test_a_run_killed_by_9_goes_on_to_the_same_losses(mode, tmp_path):
    killed = Started(train, mode, tmp_path, 0.3)
    state = tmp_path / "state.pt"
    deadline = time.monotonic() + 240
    while not (state.is_file() and len(torch.load(state, weights_only=True)["rows"]) >= 3):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    at = len(torch.load(state, weights_only=True)["rows"])
    resumed, whole = json.loads(Started(train, mode, tmp_path, 0).ended_well().stdout), trained(mode)
    assert 3 <= at < len(whole["rows"])
    # the same bits, in losses and in weights
    assert resumed == json.loads(json.dumps(whole))


SHARED = [
    dataclasses.replace(SETTINGS, epochs=2, logit_share=share, train=train)
    for share, train in ((0.0, "experts"), (1.0, "all"), (1.0, "routers"))
]


def train_as_one_of_several():
    """All of SHARED; prints what it found."""
    assert join() is not None
    print(json.dumps([trained("global", settings) for settings in SHARED]))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_two():
    """What each of two processes found."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [Started(train_as_one_of_several, environment=rank) for rank in ranks]
    return [json.loads(each.ended_well().stdout.splitlines()[-1]) for each in both]


@pytest.mark.parametrize("at", range(len(SHARED)), ids=lambda at: f"{SHARED[at].logit_share}-{SHARED[at].train}")
def test_two_processes_with_fsdp_give_the_losses_of_one(at, by_two):
    one = trained("global", SHARED[at])
    for two in (found[at] for found in by_two):
        assert two["weight"] == pytest.approx(one["weight"], rel=1e-5)
        for mine, theirs in zip(one["rows"], two["rows"], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4)
        assert two["sums"] == pytest.approx(one["sums"], rel=1e-4)
        assert tuple(two["zeros"]) == tuple(one["zeros"])


def student_and_teacher():
    return prune_by_magnitude(tiny_model("mixtral")), tiny_model("mixtral")


def test_a_state_of_another_run_is_refused(tmp_path):
    ids = windows()
    stopped = {"steps": 0}

    def stop(event):
        stopped["steps"] = event.done
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(*student_and_teacher(), ids, settings=SETTINGS, state=tmp_path, save_every=1, progress=stop)
    with pytest.raises(UsageError, match=r"holds the state of a run that was stopped; go on with resume=True"):
        distill(*student_and_teacher(), ids, settings=SETTINGS, state=tmp_path)
    for change, message in (
        (
            {"settings": dataclasses.replace(SETTINGS, epochs=7)},
            rf"must have the settings of the one in .*, {{'epochs': {SETTINGS.epochs}}}, got {{'epochs': 7}}$",
        ),
        ({"windows": windows(seed=1)}, "must have the windows of the one in"),
        ({"mode": "blockwise"}, "must have the mode of the one in .*, global, got blockwise"),
    ):
        arguments = {"windows": ids, "settings": SETTINGS} | change
        with pytest.raises(MoESparseError, match=message):
            distill(*student_and_teacher(), state=tmp_path, resume=True, **arguments)
    other = prune_by_magnitude(tiny_model("mixtral"), "1:4")
    with pytest.raises(MoESparseError, match="must have the student of the one in"):
        distill(other, tiny_model("mixtral"), ids, settings=SETTINGS, state=tmp_path, resume=True)
    report = distill(*student_and_teacher(), ids, settings=SETTINGS, state=tmp_path, resume=True)
    assert [row["step"] for row in report.rows] == list(range(8))


class TestCache:
    def test_it_stands_in_for_the_teacher(self, tmp_path):
        student, teacher = student_and_teacher()
        ids, mask = windows(), torch.ones(8, 16, dtype=torch.bool)
        mask[0, :4] = False
        live = distill(student, teacher, (ids, mask), settings=SETTINGS)
        student, _ = student_and_teacher()
        cached = distill(student, teacher, (ids, mask), settings=SETTINGS, cache=tmp_path / "cache")
        for a, b in zip(live.rows, cached.rows, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        # what was written is read: a second run never calls the teacher
        student, _ = student_and_teacher()
        teacher.model.forward = None
        again = distill(student, teacher, (ids, mask), settings=SETTINGS, cache=tmp_path / "cache")
        assert again.rows == cached.rows

    def test_removed_experts_are_matched(self, tmp_path):
        rows = []
        for cache in (None, tmp_path / "cache"):
            student, teacher = student_and_teacher()
            remove_experts(student, [[0, 2, 4, 6], [1, 2, 3, 7]])
            rows.append(distill(student, teacher, windows(), settings=SETTINGS, cache=cache).rows)
            assert rows[-1][-1]["experts"] < rows[-1][0]["experts"]
        assert rows[0] == [pytest.approx(row, rel=1e-5) for row in rows[1]]

    def test_it_has_the_size_foretold(self, tmp_path):
        student, teacher = student_and_teacher()
        distill(student, teacher, windows(), settings=SETTINGS, cache=tmp_path)
        files = sorted(tmp_path.glob("window-*.safetensors"))
        foretold = cache_bytes(match(student, teacher), 8 * 16)
        assert len(files) == 8
        # what is left is the header of each file
        assert foretold < sum(file.stat().st_size for file in files) < foretold + 8 * 1000

    def test_another_teacher_or_text_is_refused_and_a_half_full_one_is_filled(self, tmp_path):
        student, teacher = student_and_teacher()
        first = distill(student, teacher, windows(), settings=SETTINGS, cache=tmp_path)
        with pytest.raises(MoESparseError, match="cache must hold outputs of the same windows, got those of others"):
            distill(student, teacher, windows(seed=1), settings=SETTINGS, cache=tmp_path)
        (tmp_path / "window-000003.safetensors").unlink()
        again = distill(student_and_teacher()[0], teacher, windows(), settings=SETTINGS, cache=tmp_path)
        assert again.rows == [pytest.approx(row, rel=1e-5) for row in first.rows]


class TestLogs:
    def test_tensorboard_reads_them(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        report = distill(*student_and_teacher(), windows(), settings=SETTINGS, logs=tmp_path)
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        for name in ("ce", "experts", "loss", "learning_rate", "grad_norm"):
            found = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
            assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in report.rows]

    def test_without_tensorboard_it_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UsageError, match=r"pip install 'moesparse\[tensorboard\]'"):
            distill(*student_and_teacher(), windows(), settings=SETTINGS, logs=tmp_path)


def test_progress_tells_both_parts_of_the_loss():
    events = []
    report = distill(*student_and_teacher(), windows(), settings=SETTINGS, progress=events.append)
    assert [event.done for event in events] == list(range(9))
    assert all(event.total == 8 for event in events)
    assert events[-1].tokens == 8 * 4 * 16
    last = report.rows[-1]
    assert events[-1].stage == f"distill: CE {last['ce']:.3f}, experts {last['experts']:.3g}"


def test_an_expert_loss_without_weight_is_not_told(capsys):
    events = []
    settings = dataclasses.replace(SETTINGS, logit_share=1.0, expert_weight=0.0)
    report = distill(*student_and_teacher(), windows(), settings=settings, progress=events.append)
    first, last = report.rows[0], report.rows[-1]
    assert events[-1].stage == f"distill: CE {last['ce']:.3f}, KL {last['kl']:.3g}"
    show(report, Path("out"))
    told = "".join(capsys.readouterr()).splitlines()
    assert told[0] == f"cross-entropy {first['ce']:.3f} > {last['ce']:.3f}, KL {first['kl']:.4g} > {last['kl']:.4g}"


def test_the_command_lowers_the_perplexity_of_the_embedded_model_at_2_4(tmp_path):
    """prune, distill, eval: the whole way on disk, and every zero is still there."""
    from moesparse.checkpoints.pretrained import load_pretrained
    from moesparse.evaluate import perplexity
    from moesparse.pruning.recipe import Recipe
    from moesparse.pruning.run import prune

    pruned, out = tmp_path / "pruned", tmp_path / "out"
    text = torch.cat([demo.windows("calibration", domain)[:8] for domain in demo.DOMAINS])
    student, tokenizer = demo.load(torch.bfloat16)
    report = prune(student, text, Recipe(weights="2:4", saliency="moe-pruner", update="none"))
    from moesparse.checkpoints.pretrained import save_pretrained

    save_pretrained(student, pruned, tokenizer=tokenizer, recipe=report.recipe, report=report.to_dict())
    run = command(
        "distill", pruned, "--teacher", "demo", "-o", out, "--samples", 64, "--length", 256, "--epochs", 1,
        "--lr", 2e-3, "--train", "all", "--packed", "--json", environment={"COLUMNS": "100"},
    ).ended_well()  # fmt: skip
    result = json.loads(run.stdout)
    assert (result["settings"]["epochs"], result["settings"]["train"]) == (1, "all")
    assert result["zeros"][1] >= result["zeros"][0] > 0
    assert not out.with_name("out.state").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["moesparse"]["recipe"]["distillation"]["windows"] == 64
    card = (out / "README.md").read_text()
    assert (
        "the kept expert weights and all others were trained by KL to the teacher's logits from `demo`: 8 steps" in card
    )
    assert "No zero was lost" in card
    assert json.loads((out / "moesparse_report.json").read_text())["distillation"]["rows"] == result["rows"]
    recovered, _ = load_pretrained(out)
    heldout = torch.cat([demo.windows("heldout", domain)[:3] for domain in demo.DOMAINS])
    before, after = (perplexity(model, heldout).perplexity for model in (student, recovered))
    assert after < 0.95 * before


class TestCommandRefusals:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["moesparse", "distill", "demo", "--teacher", "demo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, " ".join(capsys.readouterr().err.split())

    def test_work_that_cannot_be_done(self, tmp_path, monkeypatch, capsys):
        arguments = ("-o", tmp_path / "out", "--samples", 6, "--length", 64)
        code, error = self.run(monkeypatch, capsys, *arguments)
        assert code == 1
        assert error.endswith(
            "student must be pruned, got all of the teacher's experts and no zeros in them: prune it first"
        )
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        def stopped(*_models, state, **_others):
            state_module.StateFile(state, {}, resume=False).save({"rows": []})
            raise KeyboardInterrupt

        monkeypatch.setattr("moesparse.distillation.distill", stopped)
        code, error = self.run(monkeypatch, capsys, "-o", tmp_path / "out", "--samples", 6, "--length", 64)
        assert code == 1
        assert error.endswith("out.state; the same command with --resume goes on")

    def test_wrong_usage(self, tmp_path, monkeypatch, capsys):
        code, error = self.run(monkeypatch, capsys, "-o", tmp_path / "out", "--preset", "huge")
        assert code == 2
        assert "--preset must be one of paper, small, got 'huge'" in error


def test_states_are_replaced_as_a_whole(tmp_path, monkeypatch):
    file = state_module.StateFile(tmp_path, {"mode": "global"}, resume=False)
    file.save({"rows": [1]})

    def breaks(value, handle):
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(state_module, "torch", types.SimpleNamespace(save=breaks, load=torch.load))
    with pytest.raises(CheckpointError, match=r"disk full\. The state before it is kept: make room .*resume=True"):
        file.save({"rows": [1, 2]})
    assert torch.load(Path(tmp_path) / "state.pt", weights_only=True)["rows"] == [1]


class TestFolders:
    """Blockwise from folder to folder, one layer of each model in memory."""

    SETTINGS = Settings(learning_rate=3e-3, epochs=2, batch_size=4, micro_batch=4)

    @pytest.fixture
    def folders(self, tmp_path):
        student, teacher = student_and_teacher()
        for model, name in ((student, "student"), (teacher, "teacher")):
            model.save_pretrained(tmp_path / name)
        return tmp_path / "student", tmp_path / "teacher"

    def test_the_same_bits_as_with_both_models_loaded(self, folders, tmp_path):
        report = distill_checkpoint(*folders, tmp_path / "out", windows(), settings=self.SETTINGS)
        student, teacher = student_and_teacher()
        want = distill(student, teacher, windows(), "blockwise", settings=self.SETTINGS)
        assert report.rows == want.rows
        assert report.zeros == want.zeros
        got = type(student).from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in student.state_dict().items())
        assert (
            json.loads((tmp_path / "out" / "config.json").read_text())["moesparse"]["recipe"]["distillation"]["epochs"]
            == 2
        )

    def test_a_stopped_run_goes_on(self, folders, tmp_path):
        def stop(event):
            if event.done == 6:  # in the second of two blocks of four steps
                raise KeyboardInterrupt

        arguments = (*folders, tmp_path / "out", windows())
        with pytest.raises(KeyboardInterrupt):
            distill_checkpoint(*arguments, settings=self.SETTINGS, progress=stop)
        with pytest.raises(MoESparseError, match="resume"):
            distill_checkpoint(*arguments, settings=self.SETTINGS)
        report = distill_checkpoint(*arguments, settings=self.SETTINGS, resume=True)
        whole = distill_checkpoint(*folders, tmp_path / "whole", windows(), settings=self.SETTINGS)
        assert report.rows == whole.rows
        files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "whole")]
        assert len(files[0]) == 3
        for one, other in zip(*files, strict=True):
            assert one.read_bytes() == other.read_bytes()

    def test_what_does_not_match_is_refused_before_anything_is_trained(self, folders, tmp_path):
        student, teacher = folders
        with pytest.raises(MoESparseError, match="student must be pruned"):
            distill_checkpoint(teacher, teacher, tmp_path / "out", windows())
        steps = []
        other = prune_by_magnitude(tiny_model("mixtral", seed=5))
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(MoESparseError, match=r"student's pattern must lie within the teacher's"):
            distill_checkpoint(student, tmp_path / "other", tmp_path / "out2", windows(), progress=steps.append)
        assert {event.stage for event in steps} == {"check"}


def one_run_of_folders(folders, out, place, count):
    """Blockwise from folder to folder, killed at a place (see faults.py)."""
    with pytest.MonkeyPatch.context() as patch:
        progress = Watch(patch, at(place, kill, count)).progress
        distill_checkpoint(*folders, out, windows(), settings=TestFolders.SETTINGS, progress=progress)


class TestSurvival:
    """What test_survival.py does to pruning, done to distillation."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        """Student and teacher, and what an undisturbed run makes of them."""
        path = tmp_path_factory.mktemp("folders")
        for model, name in zip(student_and_teacher(), ("student", "teacher"), strict=True):
            model.save_pretrained(path / name)
        self.run((path / "student", path / "teacher"), path / "whole")
        return path / "student", path / "teacher", path / "whole"

    def run(self, folders, out, **options):
        return distill_checkpoint(*folders[:2], out, windows(), settings=TestFolders.SETTINGS, **options)

    @pytest.mark.parametrize(
        ("place", "count"),
        [
            pytest.param("progress check", 2, id="probe"),
            pytest.param("progress distill", 7, id="a step of the second block"),
            pytest.param("renamed out/layer-00001", 1, id="a part that is not in the journal"),
            pytest.param("renamed out/model-00002-of-00003", 1, id="half of the shards have their names"),
            pytest.param("rename out/config.json", 1, id="before it is a checkpoint"),
        ],
    )
    def test_killed_at_a_named_step_it_goes_on_to_the_same_bits(self, folders, tmp_path, place, count):
        child = Started(one_run_of_folders, folders[:2], tmp_path / "out", place, count)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        self.run(folders, tmp_path / "out", resume=True)
        assert_same(tmp_path / "out", folders[2])

    def test_a_full_disk_keeps_the_finished_layers(self, folders, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            progress = Watch(patch, at("write layer-00001.partial", fail(), 5)).progress
            with pytest.raises(
                CheckpointError, match=r"No space left on device. 1 finished parts are kept .* resume=True"
            ):
                self.run(folders, tmp_path / "out", progress=progress)
        self.run(folders, tmp_path / "out", resume=True)
        assert_same(tmp_path / "out", folders[2])


class TestStates:
    """The state folder of the modes that hold both models."""

    def test_a_second_run_is_refused(self, tmp_path):
        held = []

        def second(event):
            if event.done == 2:
                with pytest.raises(CheckpointError, match=rf"process {os.getpid()} is at work") as refused:
                    distill(*student_and_teacher(), windows(), settings=SETTINGS, state=tmp_path, resume=True)
                held.append(refused)

        distill(*student_and_teacher(), windows(), settings=SETTINGS, state=tmp_path, progress=second)
        assert held
        assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]

    def test_a_full_disk_keeps_the_state_before(self, tmp_path):
        size = None
        with SmallDisk(tmp_path / "disk", "64m") as disk:
            arguments = {"settings": SETTINGS, "state": disk.path / "state", "save_every": 1}

            def fill(event):
                nonlocal size
                if event.done == 3 and size is None:
                    size = (disk.path / "state" / "state.pt").stat().st_size
                    disk.remount(f"size={size * 3 // 2}")

            with pytest.raises(CheckpointError, match=r"The state before it is kept: make room there .*resume=True"):
                distill(*student_and_teacher(), windows(), progress=fill, **arguments)
            disk.remount("size=64m")
            resumed = distill(*student_and_teacher(), windows(), resume=True, **arguments)
        assert resumed.rows == distill(*student_and_teacher(), windows(), settings=SETTINGS).rows

    def test_a_damaged_state_is_named(self, tmp_path):
        (tmp_path / "state.pt").write_bytes(b"half a file")
        with pytest.raises(CheckpointError, match="must be the state of a run, got a damaged file; remove it"):
            distill(*student_and_teacher(), windows(), settings=SETTINGS, state=tmp_path, resume=True)

    def test_a_cache_of_the_same_windows_in_another_order_is_refused(self, tmp_path):
        """Its files are found by the numbers of the windows."""
        cache, state = tmp_path / "cache", tmp_path / "state"
        distill(*student_and_teacher(), windows(), settings=SETTINGS, cache=cache)
        with pytest.raises(MoESparseError, match="cache must hold outputs of the same windows"):
            distill(*student_and_teacher(), windows().flip(0), settings=SETTINGS, cache=cache, state=state)
        assert not state.exists()

    @pytest.mark.parametrize(
        ("batch", "micro", "cure"), [(8, 8, "take micro_batch 2, or one that divides it"), (6, 1, "another batch_size")]
    )
    def test_a_batch_that_processes_cannot_share_is_refused_with_a_cure(self, batch, micro, cure):
        settings = Settings(batch_size=batch, micro_batch=micro)
        with pytest.raises(UsageError, match=rf"a multiple of the 4 processes, got {batch} / {micro}: .*{cure}"):
            TrainingProcesses(0, 4).check("global", settings)
