"""The report page: its numbers against hand-made ones, what it says, what it refuses, and that it stands alone."""

import json
import math
import re
import sys

import pytest
import torch

from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.cli import main
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.experts.criteria import expert_scores
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.report import page as report_page
from moesparse.report import sections as report
from moesparse.report.findings import Findings, read_checkpoint, read_results, read_routing
from moesparse.report.sections import build
from moesparse.testing import tiny_model
from moesparse.weights.patterns import Pattern

pytest.importorskip("matplotlib")

RECIPE = Recipe(weights="2:4", keep_experts=6, saliency="moe-pruner", update="least-squares")


def windows(seed):
    return torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned folder with its report, statistics of the dense model per domain, and what they were made from."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_model("mixtral")
    statistics = {name: calibrate(model, windows(seed)) for name, seed in (("law", 1), ("code", 2))}
    for name, sums in statistics.items():
        sums.save(root / f"{name}.stats")
    done = prune(model, windows(1), RECIPE)
    save_pretrained(model, root / "pruned", recipe=done.recipe, report=done.to_dict())
    return root, done, statistics, model


def results(*perplexities, window=256):
    files = [
        {"file": f"texts/{name}.txt", "name": name, "perplexity": value, "bits_per_byte": value / 10, "tokens": 100}
        for name, value in zip(("law", "code"), perplexities, strict=True)
    ]
    return {"perplexity": 1.0, "files": files, "protocol": {"window": window, "stride": 256, "bos": False}}


def text_of(page):
    return re.sub(r"<[^>]*>", " ", page.to_html())


class TestNumbers:
    def test_jensen_shannon_of_known_distributions(self):
        shares = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])
        half = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
        want = torch.tensor([[[0, 1, half], [1, 0, half], [half, half, 0]]], dtype=torch.float64)
        torch.testing.assert_close(report.jensen_shannon(shares), want)

    def test_even_shares_are_one_for_even_routing_and_zero_for_a_silent_layer(self):
        tokens = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])
        want = torch.tensor([[1.0] * 4, [4.0, 0, 0, 0], [0.0] * 4], dtype=torch.float64)
        assert torch.equal(report.even_shares(tokens), want)

    def test_chance_divergence_is_what_two_samples_of_one_distribution_show(self):
        generator = torch.Generator().manual_seed(0)
        p = torch.rand(16, generator=generator) + 0.2
        found = []
        for _ in range(200):
            drawn = [torch.multinomial(p, n, replacement=True, generator=generator) for n in (4000, 2000)]
            counts = torch.stack([torch.bincount(ids, minlength=16) for ids in drawn])[:, None]
            found.append(float(report.jensen_shannon(report.even_shares(counts) / 16)[0, 0, 1]))
        chance = report.chance_divergence(counts[0], counts[1])
        assert chance == pytest.approx(sum(found) / len(found), rel=0.1)
        assert report.chance_divergence(counts[0], counts[1] * 0) == math.inf

    @pytest.mark.parametrize("pattern", ["2:4", "4:8", "6:8", "1:4"])
    def test_packed_bytes_are_those_of_a_packed_weight(self, pattern):
        from moesparse.weights.patterns import mask_from_score
        from moesparse_kernels.layout import NMWeight

        n, m = Pattern.parse(pattern).group
        weight = torch.randn(2, 16, 64, dtype=torch.bfloat16)
        weight = weight.masked_fill(~mask_from_score(weight.abs(), Pattern.parse(pattern)), 0)
        packed = NMWeight.pack(weight, n=n, m=m)
        assert Pattern.parse(pattern).packed_bytes(weight.numel(), 2) == packed.nbytes

    def test_an_unstructured_pattern_saves_nothing(self):
        assert Pattern.parse(0.5).packed_bytes(100, 2) == 200

    def test_ranges(self):
        assert report_page.ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7 8"
        assert report_page.ranges([]) == ""

    @pytest.mark.parametrize(
        ("name", "label"), [("model.layers.12.mlp.experts", "12"), ("moe", "moe"), ("b3.x", "b3.x")]
    )
    def test_layer_labels(self, name, label):
        assert report_page.layer_of(name) == label


class TestWhatPruneLeaves:
    def test_scores_and_tokens_are_those_of_the_dense_model(self, made):
        root, done, statistics, _ = made
        run = json.loads((root / "pruned" / REPORT_FILE).read_text())
        want = expert_scores(statistics["law"], "reap")
        torch.testing.assert_close(torch.tensor(run["experts"]["scores"], dtype=want.dtype), want)
        tokens = [sums.tokens.tolist() for sums in statistics["law"].blocks.values()]
        assert run["experts"]["tokens"] == tokens
        assert run["fingerprint"] == statistics["law"].fingerprint
        written = {"written": "as transformers writes a model"}
        assert run == json.loads(json.dumps(done.to_dict(), allow_nan=False)) | written

    def test_sizes_before_and_after(self, made):
        _, done, _, model = made
        after = sum(p.numel() * p.element_size() for p in model.parameters())
        experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n)
        # fp32: half the values and one bit a weight
        assert done.sizes["after"] == {"model": after, "experts": experts, "packed": experts // 2 + experts // 32}
        assert done.sizes["before"]["experts"] == done.sizes["before"]["packed"] == experts * 8 // 6

    def test_the_report_of_an_earlier_run_is_not_taken_over(self, made, tmp_path):
        root, _, _, model = made
        save_pretrained(model, tmp_path / "again", source=root / "pruned")
        assert not (tmp_path / "again" / REPORT_FILE).exists()


class TestPage:
    def test_a_folder_with_statistics_and_results_shows_everything(self, made):
        root, done, _, _ = made
        findings = Findings(
            "A <page>",
            read_checkpoint(root / "pruned"),
            read_routing({"law": root / "law.stats", "code": root / "code.stats"}),
            before=results(2.0, 8.0),
            after=results(4.5, 8.0),
        )
        page = build(findings)
        assert [sentence.split(",")[0] for sentence in page.missing] == ["What was lost beside the dense model"]
        assert list(page.pngs()) == ["perplexity", "bytes", "scores", "routing", "specialisation", "domains"]
        assert all(png.startswith(b"\x89PNG") for png in page.pngs().values())
        text = text_of(page)
        assert "A &lt;page&gt;" in text
        # geometric means of (2, 8) and (4.5, 8)
        assert "4.00 → 6.00" in text
        assert "6 of 8" in text
        for block, scores in zip(done.experts["blocks"], done.experts["scores"], strict=True):
            for expert in block["removed"]:
                assert f"{expert} ({scores[expert]:.3g})" in text
        assert text.count("50.00%") == 4

    def test_it_is_one_file_that_fetches_nothing(self, made):
        root, *_ = made
        html = build(Findings("page", read_checkpoint(root / "pruned"))).to_html()
        assert "http" not in html
        assert "<script" not in html
        links = re.findall(r'(?:src|href)="([^"]*)', html)
        assert links and all(link.startswith(("#", "data:")) for link in links)
        # each figure for a broad page and for a slim one
        assert html.count('<svg role="img" aria-label="') == 2 * 3
        assert html == build(Findings("page", read_checkpoint(root / "pruned"))).to_html()

    def test_statistics_alone_name_what_is_missing(self, made):
        root, *_ = made
        page = build(Findings("routing", routing=read_routing({"law": root / "law.stats"})))
        assert [section.title for section in page.sections] == ["In short", "Routing, layer by expert"]
        assert [sentence.split(":")[0] for sentence in page.missing][1:] == [
            "Sizes, recipe and what was removed",
            "Specialisation needs statistics of two domains or more, one file each",
        ]

    def test_a_folder_without_a_report_says_so_and_keeps_the_index_map(self, made, tmp_path):
        root, *_ = made
        (tmp_path / "config.json").write_text((root / "pruned" / "config.json").read_text())
        checkpoint = read_checkpoint(tmp_path)
        text = text_of(build(Findings("bare", checkpoint)))
        assert f"the folder has no {REPORT_FILE} that says" in text
        for ids in checkpoint.kept.values():
            assert report_page.ranges(ids) in text
        assert "its weights were not read" in text

    def test_an_expert_without_tokens_is_called_so(self, made):
        root, *_ = made
        checkpoint = read_checkpoint(root / "pruned")
        expert = checkpoint.removal["blocks"][0]["removed"][0]
        checkpoint.removal["dead"][0] = [expert]
        checkpoint.removal["scores"][0][expert] = None
        assert f"{expert} (no tokens)" in text_of(build(Findings("dead", checkpoint)))

    def test_swaps_are_listed(self, made):
        root, *_ = made
        checkpoint = read_checkpoint(root / "pruned")
        name = checkpoint.removal["blocks"][1]["name"]
        checkpoint.removal["refine"] = [{"name": name, "swaps": [[5, 2]]}]
        text = text_of(build(Findings("swapped", checkpoint)))
        assert "5 → 2" in text
        assert "then experts were swapped" in text


class TestBadInput:
    def test_statistics_of_another_model(self, made, tmp_path):
        root, *_ = made
        calibrate(tiny_model("mixtral", seed=5), windows(1)).save(tmp_path / "other.stats")
        with pytest.raises(CalibrationError, match=r"same model as the first"):
            read_routing({"a": root / "law.stats", "b": tmp_path / "other.stats"})
        with pytest.raises(CalibrationError, match=r"must come from the model .* was pruned from"):
            Findings("x", read_checkpoint(root / "pruned"), read_routing({"b": tmp_path / "other.stats"}))

    def test_perplexities_that_do_not_compare(self):
        with pytest.raises(UsageError, match="must be measured alike"):
            Findings("x", before=results(2.0, 3.0), after=results(2.0, 3.0, window=128))
        other = results(2.0, 3.0)
        other["files"][0]["name"] = "medicine"
        with pytest.raises(UsageError, match="of the same texts"):
            Findings("x", before=results(2.0, 3.0), after=other)

    def test_files_of_another_kind(self, tmp_path):
        (tmp_path / "results.json").write_text('{"perplexity": 3}')
        with pytest.raises(UsageError, match="must be what `moesparse eval --json` prints"):
            read_results(tmp_path / "results.json")
        with pytest.raises(CheckpointError, match="must be a readable JSON file"):
            read_results(tmp_path / "missing.json")
        with pytest.raises(CheckpointError, match=r"must be a folder with a config\.json"):
            read_checkpoint(tmp_path)

    def test_without_matplotlib_the_extra_is_named(self, made, monkeypatch):
        root, *_ = made
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UsageError, match=r"pip install 'moesparse\[plots\]'"):
            build(Findings("x", read_checkpoint(root / "pruned")))


class TestCommand:
    def run(self, monkeypatch, capsys, *words):
        monkeypatch.setattr(sys, "argv", ["moesparse", "report", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, " ".join(err.split())

    def test_it_writes_the_page_and_the_figures(self, made, tmp_path, monkeypatch, capsys):
        root, *_ = made
        words = [root / "pruned", f"{root / 'law.stats'}=LAW", root / "code.stats", "--png", tmp_path / "png", "--json"]
        code, out, err = self.run(monkeypatch, capsys, *words, "-o", tmp_path / "new" / "page.html")
        assert code in (0, None), err
        told = json.loads(out)
        assert sorted(told["png"]) == sorted(map(str, (tmp_path / "png").iterdir()))
        assert "LAW (120 tokens), code (120 tokens)" in (tmp_path / "new" / "page.html").read_text()

    def test_a_folder_without_a_report_has_its_zeros_counted(self, made, tmp_path, monkeypatch, capsys):
        _, _, _, model = made
        save_pretrained(model, tmp_path / "bare")
        code, _, err = self.run(monkeypatch, capsys, tmp_path / "bare", "-o", tmp_path / "page.html")
        assert code in (0, None), err
        assert (tmp_path / "page.html").read_text().count("50.00%") == 4
        assert "left out: Perplexity was neither measured" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["STATS", "--evaluate"], "must hold a checkpoint folder to measure perplexity"),
            (["FOLDER", "FOLDER"], "at most one checkpoint folder"),
            (["STATS", "STATS"], "domains must differ, got 'law' twice"),
            (["nowhere"], "must be a checkpoint folder or a file of statistics, got 'nowhere'"),
            (["FOLDER", "--dense", "demo"], "--dense must come with --evaluate or --text"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_mistake_is_one_line(self, made, tmp_path, monkeypatch, capsys, words, message):
        root, *_ = made
        places = {"STATS": root / "law.stats", "FOLDER": root / "pruned"}
        words = [places.get(word, word) for word in words]
        code, _, err = self.run(monkeypatch, capsys, *words, "-o", tmp_path / "page.html")
        assert code == 2
        assert message in err
        assert not (tmp_path / "page.html").exists()


def test_a_budget_is_drawn_with_its_choice_and_its_verdict(tmp_path):
    model = tiny_model("mixtral")
    windows = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(target_bytes=0.7, compare_uniform=False, saliency="moe-pruner", update="none")
    result = prune(model, windows, recipe)
    save_pretrained(model, tmp_path / "mixed", recipe=result.recipe, report=result.to_dict())
    page = build(Findings("mixed", read_checkpoint(tmp_path / "mixed")))
    text = page.to_html()
    plan = result.budget["mixed"]
    assert "How the bytes were spent" in text and "budget" in page.pngs()
    share = plan["bytes"] / result.budget["dense"]
    assert f"{share:.4f}" in text and result.budget["summary"][5:] in text
    for block, patterns in plan["patterns"].items():
        cells = [*patterns.values(), f"{plan['drop_loss'][block]:.4f}", f"{plan['pattern_loss'][block]:.4f}"]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
