"""Several processes share the work layer by layer: the results of one, one voice, and one end.

Processes are started as torchrun starts them, by their environment, from a server that has the slow imports behind it;
one test goes through torchrun itself.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import assert_same
from processes import server

from moesparse import Recipe
from moesparse.calibration.checkpoint import calibrate_checkpoint
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.cli import main
from moesparse.errors import CalibrationError, ProcessError, UsageError
from moesparse.pruning.run import prune_checkpoint
from moesparse.system.folders import JOURNAL_FILE
from moesparse.system.processes import Processes, join
from moesparse.system.run_folder import RunFolder
from moesparse.system.unfinished import unfinished_run
from moesparse.testing import tiny_model
from moesparse.weights.mask_rules import choose_masks

WINDOWS = torch.randint(3, 60, (9, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(WINDOWS)
MASK[2, :5] = 0
MASK[7, 9:] = 0
# two windows are one batch: all processes but one have none
FEW = WINDOWS[:2]

RECIPES = {
    "paper": Recipe(weights="2:4", saliency="moe-pruner", update="none"),
    "obs": Recipe(weights="2:4", saliency="gated-sparsegpt", update="obs"),
    "default": Recipe(weights="2:4"),
    "unpropagated": Recipe(weights="2:4", saliency="wanda", update="least-squares+rescale", propagate=False),
    "asymmetric": Recipe(weights="2:4", saliency="gated-sparsegpt", update="asymmetric+rescale"),
    "tune": Recipe(weights="2:4", saliency="moe-pruner", update="least-squares+tune"),
    "values": Recipe(weights="2:4", saliency="moe-pruner", update="least-squares", values="mxfp4"),
    "ratio": Recipe(weights=0.5, saliency="sparsegpt", update="rescale"),
    "random": Recipe(weights="2:4", saliency="random", update="none", seed=3),
    "few": Recipe(weights="2:4", saliency="moe-pruner", update="least-squares+rescale"),
    "refit": Recipe(weights=None, experts=0.25),
    "merge": Recipe(weights=None, experts=0.25, expert_method="m-smoe", update="none"),
    "merge and refit": Recipe(weights=None, experts=0.5, expert_method="ream"),
    "both": Recipe(
        weights="2:4",
        experts=0.3,
        expert_budget="global",
        allow_non_uniform=True,
        saliency="moe-pruner",
        update="none",
    ),
    "weights alone": Recipe(weights="2:4", saliency="magnitude", update="none"),
}
TEXTS = {
    "default": (WINDOWS, MASK),
    "refit": (WINDOWS, MASK),
    "merge and refit": (WINDOWS, MASK),
    "few": FEW,
    "weights alone": None,
}
# what two processes do beside three, of which one has no batch of FEW too
OF_TWO = ("default", "merge and refit", "both")
RUNS = [(count, name) for count in (3, 2) for name in RECIPES if count == 3 or name in OF_TWO]
CALIBRATIONS = {"plain": ("none", WINDOWS), "moments": ("both", (WINDOWS, MASK)), "few": ("gated", FEW)}


def child(environment, log, work, arguments):
    os.environ.update(environment)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    torch.set_num_threads(1)
    work(*arguments)


class Job(list):
    def __init__(self, store):
        super().__init__()
        self.store = store


def start(count, work, *arguments, logs):
    """Processes that do `work(*arguments)` as ranks of one job; what each prints is in a file in the folder `logs`.

    As torchrun's agent does, this process keeps their store.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    logs.mkdir(exist_ok=True)
    started = Job(store)
    for rank in map(str, range(count)):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
        # a process may be ended before it has opened its own
        (logs / rank).touch()
        started.append(server.Process(target=child, args=(environment, logs / rank, work, arguments)))
        started[-1].start()
    return started


def finish(started, logs):
    """Exit codes and what was printed, by rank."""
    for process in started:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
            pytest.fail(f"a process hangs; printed: {[file.read_text() for file in sorted(logs.iterdir())]}")
    return [process.exitcode for process in started], [file.read_text() for file in sorted(logs.iterdir())]


def everything(folder, out, count=3):
    """Every recipe and calibration that as many processes do, from the model in `folder`."""
    join()
    for name, recipe in RECIPES.items():
        if (count, name) not in RUNS:
            continue
        prune_checkpoint(folder, out / name, TEXTS.get(name, WINDOWS), recipe, batch_size=2)
    for name, (moments, windows) in CALIBRATIONS.items():
        by_window = {}
        path = out / f"{name}.stats"
        calibrate_checkpoint(folder, path, windows, moments=moments, batch_size=2, by_window=by_window)
        torch.save(by_window, out / f"{name}.{Processes.current().rank}.pt")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight experts of transposed shape and with biases: three processes get unequal shares."""
    path = tmp_path_factory.mktemp("source")
    tiny_model("gpt_oss").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    everything(source, out)
    return out


@pytest.fixture(scope="module")
def several(source, tmp_path_factory):
    """A function: the folder of what so many processes give, which run once."""

    @functools.cache
    def of(count):
        out = tmp_path_factory.mktemp("several")
        logs = out / "logs"
        codes, printed = finish(start(count, everything, source, out, count, logs=logs), logs)
        assert codes == [0] * count, printed
        return out

    return of


def numbers(value):
    """A report without what depends on the machine; numbers to be compared to float64 rounding."""
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items() if key not in ("seconds", "peak_bytes")}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_several_processes_prune_to_the_bits_of_one(one, several, count, name):
    """The sums of all batches are equal to float64 rounding; solved in float32 and stored in bfloat16 nothing is left
    of that here."""
    out = several(count)
    assert_same(one / name, out / name)
    want, got = (json.loads((folder / name / "moesparse_report.json").read_text()) for folder in (one, out))
    assert got.keys() == want.keys()
    for key in want.keys() - {"seconds", "inputs"}:
        assert numbers(want[key]) == strip(got[key]), key
    assert sorted(file.name for file in (out / name).iterdir()) == sorted(file.name for file in (one / name).iterdir())


def strip(value):
    if isinstance(value, dict):
        return {key: strip(each) for key, each in value.items() if key not in ("seconds", "peak_bytes")}
    return [strip(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("count", [3, 2])
@pytest.mark.parametrize("name", CALIBRATIONS)
def test_several_processes_calibrate_to_the_sums_of_one(one, several, count, name):
    """A batch's float32 sums are those of one process; only the order in which float64 adds them up differs."""
    out = several(count)
    want, got = (ModelStatistics.load(folder / f"{name}.stats") for folder in (one, out))
    assert got.metadata() == want.metadata()
    for block, statistics in want.blocks.items():
        found = got.blocks[block].named_tensors() | got.blocks[block].named_maxima()
        wanted = statistics.named_tensors() | statistics.named_maxima()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            if key == "tokens" or key.startswith("maxima"):
                assert torch.equal(found[key], tensor)
            torch.testing.assert_close(found[key], tensor, rtol=1e-14, atol=1e-14 * float(tensor.abs().max()))
    # each window is summed up by one process
    for rank in range(count):
        sums, others = torch.load(one / f"{name}.0.pt"), torch.load(out / f"{name}.{rank}.pt")
        assert sums.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in sums.items())


def test_calibrating_in_one_process_is_what_it_was(source, one):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    want = calibrate(model, (WINDOWS, MASK), moments="both", batch_size=2)
    got = ModelStatistics.load(one / "moments.stats")
    for block, statistics in want.blocks.items():
        for key, tensor in statistics.named_tensors().items():
            assert torch.equal(tensor, got.blocks[block].named_tensors()[key])


@pytest.mark.parametrize("count", [1, 3, 11])
def test_a_random_mask_does_not_depend_on_the_share(count):
    weight = torch.rand(8, 4, 16)
    options = {"rule": "random", "pattern": RECIPES["random"].pattern, "stats": None, "input": "hidden", "seed": 5}
    whole = choose_masks(weight, **options).mask
    parts = Processes(0, count).parts(8)
    got = [choose_masks(weight[part], first=part.start, **options).mask for part in parts if len(weight[part])]
    assert torch.equal(torch.cat(got), whole)


def harmed(arguments, rank, harm):
    """The command line, in which one rank comes to harm when it prunes the second block."""
    sys.argv = ["moesparse", *arguments]
    if os.environ["RANK"] == rank:
        from moesparse.pruning import block as layer_pruning

        prune, calls = layer_pruning.prune_in_place, []

        def once(*given, **options):
            calls.append(1)
            if len(calls) == 3:
                harm()
            return prune(*given, **options)

        layer_pruning.prune_in_place = once
    main()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nothing():
    pass


def overflow():
    raise CalibrationError("activations must be finite, got inf")


def defect():
    raise KeyError("no such expert")


def command(out, *more):
    rules = ["--saliency", "moe-pruner", "--update", "none", "--samples", "6", "--length", "64", "--batch-size", "2"]
    return ["prune", "demo", str(out), *rules, *more]


def run(arguments, logs, rank="", harm=nothing, count=2):
    return finish(start(count, harmed, arguments, rank, harm, logs=logs), logs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed process gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["moesparse", *command(out)])
        main()
    return out


# the first one speaks, and where it is gone another one must
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job_with_one_sentence(tmp_path, whole, rank):
    out = tmp_path / "out"
    codes, printed = run(command(out), tmp_path / "logs", str(rank), die)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    together = "".join(printed)
    assert together.count("stopped:") == 1
    assert f"stopped: the process of rank {rank} of 2 has ended; 1 finished parts are kept in {out}; " in together
    assert "the same command with --resume goes on" in together
    assert not any(word in together for word in ("Traceback", "gloo", "error:"))
    if not rank:
        return
    shutil.copytree(out, tmp_path / "copy")

    codes, printed = run(command(out), tmp_path / "refused")
    assert codes == [1, 1]
    assert "".join(printed).count("error: OUT holds an unfinished run, 1 parts done") == 1
    assert not printed[1]

    codes, printed = run(command(out, "--resume"), tmp_path / "resumed")
    assert codes == [0, 0]
    assert not printed[1]
    assert "wrote" in printed[0]
    assert_same(out, whole)
    codes, _ = run(command(tmp_path / "copy", "--resume"), tmp_path / "alone", count=1)
    assert codes == [0]
    assert_same(tmp_path / "copy", whole)


@pytest.mark.parametrize(
    ("rank", "harm", "said"),
    [
        (1, overflow, "error: process of rank 1 of 2: activations must be finite, got inf"),
        (0, defect, "unexpected KeyError: 'no such expert'"),
    ],
)
def test_an_error_in_one_process_is_said_once(tmp_path, rank, harm, said):
    codes, printed = run(command(tmp_path / "out"), tmp_path / "logs", str(rank), harm)
    assert codes == [1, 1]
    assert said in printed[rank].replace("\n", " ")
    together = "".join(printed)
    assert together.count("error:") + together.count("unexpected") == 1
    assert "stopped:" not in together
    assert "Traceback" not in together
    assert len(json.loads((tmp_path / "out" / JOURNAL_FILE).read_text())["parts"]) == 1


def test_a_signal_to_all_is_said_once(tmp_path):
    started = start(2, harmed, command(tmp_path / "out"), "1", pause, logs=tmp_path / "logs")
    deadline, journal = time.monotonic() + 240, tmp_path / "out" / JOURNAL_FILE
    # a folder has its name before the journal knows of it
    while not (journal.exists() and json.loads(journal.read_text())["parts"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in started:
        process.terminate()
    codes, printed = finish(started, tmp_path / "logs")
    assert codes == [1, 1]
    together = "".join(printed)
    assert together.count("stopped: 1 finished parts are kept in") == 1
    assert "has ended" not in together


def within_a_layer(folder, out, stop):
    """Expert by expert, and by an error in every process after `stop` of them; prints how many it solved."""
    from moesparse.pruning import block

    join()
    solve, solved = block._prune_experts, []

    def watched(*given):
        if len(solved) == stop:
            raise CalibrationError("stopped here")
        solved.append(1)
        return solve(*given)

    block.expert_slices = lambda weight: [slice(expert, expert + 1) for expert in range(len(weight))]
    block._prune_experts = watched
    with contextlib.suppress(CalibrationError):
        prune_checkpoint(folder, out, WINDOWS, RECIPES["obs"], batch_size=2, resume=True, progress=None)
    print("solved", len(solved), flush=True)


@pytest.mark.parametrize("count", [2, 1])
def test_what_every_process_had_solved_of_a_layer_is_kept(tmp_path, count):
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")

    def solved(out, stop, count=2):
        logs = tmp_path / f"logs-{out}-{stop}-{count}"
        codes, printed = finish(start(count, within_a_layer, tmp_path / "model", tmp_path / out, stop, logs=logs), logs)
        assert codes == [0] * count, printed
        return [int(said.rpartition("solved ")[2]) for said in printed]

    # two layers of eight experts, two matrices each
    assert solved("whole", None) == [16, 16]
    assert solved("out", 6) == [6, 6]
    assert unfinished_run(tmp_path / "out").solved == 12
    # with fewer processes too, where the sums are the same bits
    assert sum(solved("out", None, count)) == 32 - 12
    assert_same(tmp_path / "out", tmp_path / "whole")


def pause():
    time.sleep(60)


@pytest.mark.parametrize("option", ["--whole", "--nonsense"])
def test_wrong_usage_is_said_by_the_first_alone(tmp_path, option):
    started = start(2, harmed, command(tmp_path / "out", option), "", nothing, logs=tmp_path)
    started[0].join(timeout=240)
    assert started[0].exitcode == 2
    # torchrun ends the others when one has ended
    started[1].terminate()
    _, (told, untold) = finish(started, tmp_path)
    assert not untold
    assert option.partition("=")[0] in told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_one_plan_for_each_process(tmp_path):
    codes, printed = run(command(tmp_path / "out", "--dry-run", "--json"), tmp_path / "logs")
    assert codes == [0, 0]
    assert not printed[1]
    plan = json.loads(printed[0])
    assert plan["processes"] == 2
    # six windows in batches of two: two batches in the first process
    assert plan["hidden_states"] == 4 * 64 * 192 * 2


def differ(out):
    join()
    mine = Processes.current().rank
    for inputs, said in (({"windows": mine}, "the same windows, got"), ({"windows": 0}, "")):
        with contextlib.ExitStack() as stack:
            if said:
                stack.enter_context(pytest.raises(UsageError, match=said))
            stack.enter_context(RunFolder.open(out, inputs, resume=False, processes=Processes.current()))
    with pytest.raises(UsageError, match="first"):
        Processes.current().from_first(refuse)
    if mine:
        os._exit(7)
    with pytest.raises(ProcessError, match="has ended or cannot be reached"):
        Processes.current().add_up([torch.ones(3)])
    os._exit(0)


def refuse():
    raise UsageError("only the first does this")


def test_processes_that_differ_are_refused_and_those_that_end_are_noticed(tmp_path):
    codes, printed = finish(start(2, differ, tmp_path / "out", logs=tmp_path / "logs"), tmp_path / "logs")
    assert codes == [0, 7], printed


def test_under_torchrun_a_killed_process_is_told(tmp_path):
    script = tmp_path / "run.py"
    here = Path(__file__).parent
    script.write_text(
        f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}\n"
        f"import test_ranks\ntest_ranks.harmed({command(tmp_path / 'out')!r}, '1', test_ranks.die)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script)], capture_output=True, text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    )
    assert done.returncode == 1
    said = f"stopped: the process of rank 1 of 2 has ended; 1 finished parts are kept in {tmp_path / 'out'}"
    assert done.stderr.count(said) == 1
    assert done.stderr.count("stopped:") == 1
