"""Records of text and images: what the processor gives is what the model is run on, whatever file they come from."""

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from image_data import MARKED, picture, processor

import moesparse
from moesparse.calibration.images import holds_images, image_windows
from moesparse.calibration.recorder import record as recorded
from moesparse.checkpoints.processor import load_processor
from moesparse.cli.text import TextOptions
from moesparse.distillation import Settings, distill
from moesparse.distillation.training import windows_of_step
from moesparse.errors import CalibrationError, CheckpointError, MoESparseError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import prune_by_magnitude, tiny_model
from moesparse.text import TextSource

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def reader():
    return processor()


def png(seed: int, height: int = 16) -> bytes:
    file = io.BytesIO()
    picture(seed, height).save(file, "png")
    return file.getvalue()


def lines(folder: Path, *records: dict) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    for seed in range(6):
        (folder / "pictures" / f"{seed}.png").write_bytes(png(seed, 16 + 8 * (seed % 3)))
    picture(0).resize((1, 300)).save(folder / "pictures" / "thin.png")
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(each) + "\n\n" for each in records))
    return file


def six(text: str = "what is it?") -> list[dict]:
    return [{"text": f"{text} {seed}", "image": f"pictures/{seed}.png"} for seed in range(6)]


def drawn(path: Path, reader, **more):
    options = {"samples": 6, "length": 64} | more
    return image_windows([TextSource(str(path), "seen")], reader, **options)[0]


def real(found, row: int) -> list[int]:
    return found.ids[row][found.mask[row]].tolist()


def test_each_record_is_what_the_processor_makes_of_it(reader, tmp_path):
    """Marks in the text, a message of the user around it, messages with images inside and beside them, no image."""
    marked = {"text": f"a{MARKED}b", "images": ["pictures/1.png"]}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
        {"role": "user", "content": [{"type": "image", "image": "pictures/2.png"}]},
    ]
    kinds = [
        ({"text": "a", "image": "pictures/0.png"}, f"{MARKED}a", [0]),
        (marked, marked["text"], [1]),
        # the image that a message names is its own, the other one is the record's
        ({"messages": messages, "image": "pictures/3.png"}, f"{MARKED}x{MARKED}", [3, 2]),
        ({"text": "no image"}, "no image", []),
    ]
    file = lines(tmp_path, *(kind[0] for kind in kinds))
    assert holds_images(file)
    found = drawn(file, reader, samples=4)
    by_ids = {tuple(real(found, row)): row for row in range(4)}
    for _, text, seeds in kinds:
        images = [picture(seed, 16 + 8 * (seed % 3)) for seed in seeds]
        want = reader(text=[text], images=images or None, return_tensors="pt")
        row = by_ids[tuple(want["input_ids"][0].tolist())]
        got = found.inputs[row]
        assert got["mm_token_type_ids"][found.mask[row][None]].tolist() == want["mm_token_type_ids"][0].tolist()
        assert got["mm_token_type_ids"].shape == (1, found.ids.shape[1])
        for name in ("pixel_values", "image_grid_thw"):
            assert (name in got) == (name in want) and (name not in want or got[name].equal(want[name])), name
        assert found.stands_in[row].tolist() == (found.ids[row] == 260).tolist()
    assert found.images == 4
    assert (found.ids[~found.mask] == 0).all()


def test_a_table_gives_what_lines_give(reader, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = lines(tmp_path, *six())
    texts = [each["text"] for each in six()]
    heights = [16 + 8 * (seed % 3) for seed in range(6)]
    columns = {
        "struct": [{"bytes": png(seed, heights[seed]), "path": None} for seed in range(6)],
        "bytes": [png(seed, heights[seed]) for seed in range(6)],
        "path": [f"pictures/{seed}.png" for seed in range(6)],
    }
    want = drawn(file, reader)
    for column in columns.values():
        pyarrow.parquet.write_table(pa.table({"text": texts, "image": column}), tmp_path / "records.parquet")
        assert holds_images(tmp_path / "records.parquet")
        got = drawn(tmp_path / "records.parquet", reader)
        assert got.ids.equal(want.ids) and list(got.marks) == list(want.marks)


def test_seed_samples_and_domains(reader, tmp_path):
    file = lines(tmp_path, *six())
    text = tmp_path / "plain.txt"
    text.write_text("words and words. " * 100)
    found, domains = image_windows(
        [TextSource(str(file), "seen"), TextSource(str(text), "read")], reader, samples=5, length=40, seed=3
    )
    assert sorted(domains) == ["read"] * 2 + ["seen"] * 3
    for row, domain in enumerate(domains):
        assert bool(found.stands_in[row].any()) == (domain == "seen")
        assert domain == "seen" or found.mask[row].all()
        # every window has the kinds of its tokens, text too
        assert found.inputs[row]["mm_token_type_ids"].shape == (1, 40)
    one, same, other = (drawn(file, reader, samples=3, seed=seed) for seed in (1, 1, 2))
    assert one.ids.equal(same.ids) and list(one.marks) == list(same.marks)
    assert list(one.marks) != list(other.marks)


def test_long_records_are_left_out_and_counted(reader, tmp_path):
    file = lines(tmp_path, *six()[:3], {"text": "long" * 30, "image": "pictures/3.png"})
    found = drawn(file, reader, samples=3, length=40)
    assert found.ids.shape[1] <= 40
    with pytest.raises(
        CalibrationError,
        match=r"must hold 4 records of at most 40 tokens, got 3 and 1 longer ones, of \d+ tokens and more; give more "
        r"records, or samples=3 or length=\d+$",
    ):
        drawn(file, reader, samples=4, length=40)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "pictures/0.png"}, r'record 1 must have a string "text" or a list "messages", got'),
        (
            {"text": "a", "image": "nowhere.png"},
            r"record 1 must name an image that is there, got 'nowhere.png', looked",
        ),
        ({"text": "a", "image": 7}, r"record 1 must name an image by its path or hold its bytes, got 7"),
        ({"text": MARKED * 2, "image": "pictures/0.png"}, r"an image for each <\|image_pad\|>, got 1 for 2"),
        (
            {"text": "a", "image": "records.jsonl"},
            r"record 1 must hold an image that Pillow reads, got .*records.jsonl",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "image": "pictures/0.png"},
            r"record 1 must have an image for each one in its messages, got 1 for 0",
        ),
        (
            {"text": "a", "image": "pictures/thin.png"},
            r"record 1 must be what the model's processor takes, got .*ratio",
        ),
    ],
)
def test_what_cannot_be_read_is_named(record, message, reader, tmp_path):
    with pytest.raises(MoESparseError, match=message):
        drawn(lines(tmp_path, record), reader, samples=1)


def test_without_a_chat_template_a_text_must_say_where_its_images_belong(tmp_path):
    reader = processor(template=None)
    with pytest.raises(MoESparseError, match=r"record 1 must say by '<\|image_pad\|>' where its images belong"):
        drawn(lines(tmp_path, *six()[:1]), reader, samples=1)
    assert drawn(lines(tmp_path, {"text": MARKED, "image": "pictures/0.png"}), reader, samples=1).images == 1


def test_sums_are_those_of_the_model_run_record_by_record(reader, tmp_path):
    """Streamed from a folder and on the whole model, in padded batches: the sums of each record by itself, added up."""
    model = tiny_model("qwen3_vl_moe", vocab_size=264)
    model.save_pretrained(tmp_path / "model")
    found = drawn(lines(tmp_path, *six()), reader)
    whole = moesparse.calibrate(model, found, batch_size=4)
    streamed = moesparse.calibrate_checkpoint(tmp_path / "model", tmp_path / "stats", found, batch_size=4)
    assert streamed.text_hash == whole.text_hash and streamed.tokens == whole.tokens == int(found.mask.sum())
    blocks = find_moe_blocks(model)
    with recorded(blocks) as alone, torch.no_grad():
        for row in range(len(found.ids)):
            seen = dict(found.inputs[row])
            seen["mm_token_type_ids"] = seen["mm_token_type_ids"][:, found.mask[row]]
            model(input_ids=found.ids[row][found.mask[row]][None], **seen)
    for each in alone:
        want = each.statistics
        for got in (whole, streamed):
            mine = got.blocks[each.block.name]
            assert mine.tokens.equal(want.tokens)
            # float32 activations of 32 channels, in another order of summation
            torch.testing.assert_close(mine.gated_norm_sum, want.gated_norm_sum, rtol=1e-4, atol=1e-5)


def test_experts_that_only_see_images_are_idle_without_them(reader, tmp_path):
    """What the warning is about: the same text with its images reaches more experts, and other ones stay."""
    model = tiny_model("qwen3_vl_moe", vocab_size=264)
    found = drawn(lines(tmp_path, *six("?")), reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = moesparse.calibrate(model, found)
    with pytest.warns(UserWarning, match="experts that only see what comes from there look idle"):
        read = moesparse.calibrate(model, (found.ids, found.mask))
    for name, block in seen.blocks.items():
        assert block.tokens.sum() == read.blocks[name].tokens.sum()
        assert not block.tokens.equal(read.blocks[name].tokens)


def test_commands_read_them_through_the_folder_of_the_model(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("moesparse.checkpoints.processor.load_processor", lambda source: reader)
    file, eyes = lines(tmp_path, *six()), tiny_model("qwen3_vl_moe", vocab_size=264)
    options = TextOptions([f"{file}=street"], samples=4, length=64, seed=0)
    got = options.read(reader.tokenizer, "model", eyes)
    assert got.domains == ["street"] * 4 and got.windows.images == 4
    # a model without eyes reads the text of the same records
    blind = TextOptions([str(file)], samples=4, length=8, seed=0)
    assert isinstance(blind.read(reader.tokenizer, "m", tiny_model("mixtral", vocab_size=264)).windows, torch.Tensor)
    made = TextOptions([str(file)], samples=4, length=64, seed=0, from_model=8)
    with pytest.raises(UsageError, match="--demonstrations-from-model must be left out with images"):
        made.read(reader.tokenizer, "model", eyes)


def test_a_report_says_how_many_images_were_seen_and_bytes_are_not_compared_on_them(reader, tmp_path):
    model, found = tiny_model("qwen3_vl_moe", vocab_size=264), drawn(lines(tmp_path, *six()), reader)
    with pytest.raises(UsageError, match=r"text alone to keep some of it aside .*compare_uniform=False"):
        moesparse.prune(model, found, moesparse.Recipe(target_bytes="0.6"))
    with pytest.raises(UsageError, match=r"windows must be text alone to refine the choice, got images"):
        moesparse.prune(model, found, moesparse.Recipe(weights=None, experts=0.25, refine_experts=True))
    with pytest.raises(UsageError, match=r"windows must be text alone to be scored"):
        moesparse.evaluate.perplexity(model, found)
    report = moesparse.prune(model, found, moesparse.Recipe(saliency="wanda", update="none"))
    length = found.ids.shape[1]
    tokens = int(found.mask.sum())
    assert report.calibration == {"windows": 6, "length": length, "tokens": tokens, "images": 6}


@pytest.mark.parametrize("mode", ["blockwise", "global"])
def test_a_student_learns_from_images_and_its_tower_stays(mode, reader, tmp_path):
    """With all weights to train too; what stands for an image is nothing to predict."""
    teacher, student = (tiny_model("qwen3_vl_moe", vocab_size=264) for _ in range(2))
    prune_by_magnitude(student)
    before = {name: each.clone() for name, each in student.state_dict().items()}
    found = drawn(lines(tmp_path, *six()), reader)
    trains = {"train": "all", "expert_weight": 0.0} if mode == "global" else {}
    settings = Settings(epochs=1, batch_size=2, micro_batch=2, learning_rate=1e-3, **trains)
    report = distill(student, teacher, found, mode, settings=settings)
    changed = {name for name, each in student.state_dict().items() if not each.equal(before[name])}
    assert changed and not any("visual" in name for name in changed)
    assert all((student.state_dict()[name] == 0)[before[name] == 0].all() for name in changed if "experts" in name)
    if mode == "blockwise":
        assert all("experts" in name for name in changed)
        return
    assert "model.language_model.embed_tokens.weight" in changed
    numbers = windows_of_step(0, 6, settings)
    want = sum(cross_entropy(student.__class__._from_config, before, student.config, found, row) for row in numbers)
    tokens = sum(int(targets(found, row).sum()) for row in numbers)
    assert report.rows[0]["ce"] == pytest.approx(float(want) / tokens, rel=1e-4)


def targets(found, row: int) -> torch.Tensor:
    """[t - 1] of the tokens behind the first: real, and no part of an image."""
    return found.mask[row, 1:] & (found.ids[row, 1:] != 260)


def cross_entropy(build, state, config, found, row: int) -> torch.Tensor:
    """Summed over the targets of one record, which runs by itself."""
    model = build(config).eval()
    model.load_state_dict(state)
    length = int(found.mask[row].sum())
    seen = dict(found.inputs[row])
    seen["mm_token_type_ids"] = seen["mm_token_type_ids"][:, :length]
    with torch.no_grad():
        logits = model(input_ids=found.ids[row, :length][None], **seen).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, found.ids[row, 1:length], reduction="none")
    return losses[targets(found, row)[: length - 1]].sum()


def test_a_folder_without_a_processor_is_refused_in_one_sentence(reader, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"MODEL must hold the processor that it reads images with, got .*without"
    ):
        load_processor(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"MODEL must hold the processor that it reads images with"):
        load_processor(tmp_path)


def test_a_processor_that_lacks_a_package_is_refused_with_the_cure(reader, tmp_path):
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("torchvision is there")
    reader.save_pretrained(tmp_path)
    tiny_model("qwen3_vl_moe").config.save_pretrained(tmp_path)
    videos = {
        "processor_class": "Qwen3VLProcessor",
        "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | videos))
    with pytest.raises(CheckpointError, match=r"lacks a package: .*orchvision.*; pip install 'moesparse\[images\]'$"):
        load_processor(tmp_path)
