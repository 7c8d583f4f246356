"""Split the documents into training, held-out and calibration text, train the tokenizer, and pack training tokens.

Whole documents are held out. Every line of the training text that shares a 60-character window with any held-out text,
of any domain, is dropped, and a second pass checks that none is left. Calibration text is cut from the training side.

Writes, for each of the six domains:
    <assets>/text/heldout/<domain>.txt       about 100 kB, shipped
    <assets>/text/calibration/<domain>.txt   about 30 kB, shipped
    <work>/tokens/<domain>.npy               uint16 (tokens,), documents separated by <|endoftext|>
and the tokenizer, in <assets>/model/.

    python benchmarks/demo_model/build_text.py --work /tmp/demo_model --assets moesparse/demo
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DOMAINS = ("scripture", "novel", "play", "dictionary", "code", "manual")
SEPARATOR = "<|endoftext|>"

HELDOUT_BYTES = 100_000
# one long document must not be the whole held-out text of its domain; what is cut off is used nowhere
HELDOUT_DOCUMENT_BYTES = 34_000
CALIBRATION_BYTES = 30_000
CALIBRATION_DOCUMENT_BYTES = 5_000
TOKENIZER_BYTES = 3_000_000
LEAK_CHARACTERS = 60


def take_lines(lines: list[str], limit: int) -> str:
    """Join the leading `lines` that fit into `limit` UTF-8 bytes."""
    taken, size = [], 0
    for line in lines:
        size += len(line.encode())
        if size > limit:
            break
        taken.append(line)
    return "".join(taken)


def hold_out(documents: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw whole documents until HELDOUT_BYTES are reached.

    Returns:
        (held-out texts, training documents in their original order).
    """
    order = rng.sample(range(len(documents)), len(documents))
    held, size = [], 0
    for index in order:
        limit = min(HELDOUT_DOCUMENT_BYTES, HELDOUT_BYTES - size)
        text = take_lines(documents[index].splitlines(keepends=True), limit)
        held.append(text)
        size += len(text.encode())
        if size > HELDOUT_BYTES - 2_000:
            break
    taken = set(order[: len(held)])
    return held, [document for index, document in enumerate(documents) if index not in taken]


def window_hashes(text: str) -> np.ndarray:
    """Hash every window of LEAK_CHARACTERS characters: uint64 (characters - LEAK_CHARACTERS + 1,)."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = max(len(points) - LEAK_CHARACTERS + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(LEAK_CHARACTERS):
        # a polynomial modulo 2**64; a collision only drops a line too many
        hashes *= np.uint64(6364136223846793005)
        hashes += points[offset : offset + count] + np.uint64(1442695040888963407)
    return hashes


def drop_leaks(document: str, held_hashes: np.ndarray) -> tuple[str, int]:
    """Drop the lines of `document` that overlap a window of the held-out text; `held_hashes` is sorted.

    Returns:
        (the remaining text, number of leaking windows found).
    """
    hashes = window_hashes(document)
    slots = np.searchsorted(held_hashes, hashes).clip(max=len(held_hashes) - 1)
    starts = np.flatnonzero(held_hashes[slots] == hashes)
    if len(starts) == 0:
        return document, 0
    leaking = np.zeros(len(document) + 1, dtype=np.int32)
    np.add.at(leaking, starts, 1)
    np.add.at(leaking, starts + LEAK_CHARACTERS, -1)
    leaking = np.cumsum(leaking) > 0
    kept, offset = [], 0
    for line in document.splitlines(keepends=True):
        if not leaking[offset : offset + len(line)].any():
            kept.append(line)
        offset += len(line)
    return "".join(kept), len(starts)


def calibration_text(documents: list[str], rng: random.Random) -> str:
    """Cut excerpts at line starts out of randomly drawn training documents."""
    excerpts, size = [], 0
    for document in rng.sample(documents, len(documents)):
        lines = document.splitlines(keepends=True)
        # not always the head of a document: files begin with their licence, plays with the list of persons
        first = rng.randrange(max(1, len(lines) * 3 // 4))
        text = take_lines(lines[first:], min(CALIBRATION_DOCUMENT_BYTES, CALIBRATION_BYTES - size))
        excerpts.append(text)
        size += len(text.encode())
        if size > CALIBRATION_BYTES - 1_000:
            break
    return "".join(excerpts)


def train_tokenizer(training: dict[str, list[str]], vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the same number of bytes of each domain."""
    sample = []
    for domain in DOMAINS:
        rng, size = random.Random(f"{seed}:tokenizer:{domain}"), 0
        for document in rng.sample(training[domain], len(training[domain])):
            sample.append(document)
            size += len(document.encode())
            if size > TOKENIZER_BYTES:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder fetch_text.py wrote to")
    parser.add_argument("--assets", type=Path, default=Path("moesparse/demo"), help="text/ and model/ are written here")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    held: dict[str, list[str]] = {}
    training: dict[str, list[str]] = {}
    for domain in DOMAINS:
        with (args.work / "documents" / f"{domain}.jsonl").open(encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file]
        held[domain], training[domain] = hold_out(documents, random.Random(f"{args.seed}:heldout:{domain}"))

    held_text = {domain: "\n".join(texts) for domain, texts in held.items()}
    held_hashes = np.unique(np.concatenate([window_hashes(text) for text in held_text.values()]))
    for domain in DOMAINS:
        before = sum(map(len, training[domain]))
        # dropping a line joins its neighbours, which can make a new window: repeat until nothing is found
        while True:
            results = [drop_leaks(document, held_hashes) for document in training[domain]]
            training[domain] = [text for text, _ in results if text.strip()]
            if not sum(found for _, found in results):
                break
        after = sum(map(len, training[domain]))
        print(f"{domain:12s} {before - after:7d} of {before} training characters dropped: they are in held-out text")

    for split in ("heldout", "calibration"):
        (args.assets / "text" / split).mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        calibration = calibration_text(training[domain], random.Random(f"{args.seed}:calibration:{domain}"))
        if np.isin(window_hashes(calibration), held_hashes).any():
            raise ValueError(f"calibration text of {domain} must share no window with held-out text: try another seed")
        for split, text in (("heldout", held_text[domain]), ("calibration", calibration)):
            (args.assets / "text" / split / f"{domain}.txt").write_text(text, encoding="utf-8", newline="\n")

    tokenizer = train_tokenizer(training, args.vocab_size, args.seed)
    tokenizer.save_pretrained(args.assets / "model")
    (args.work / "tokens").mkdir(exist_ok=True)
    for domain in DOMAINS:
        ids = tokenizer(training[domain], add_special_tokens=False, verbose=False)["input_ids"]
        packed = np.concatenate([np.array([*document, tokenizer.eos_token_id], dtype=np.uint16) for document in ids])
        np.save(args.work / "tokens" / f"{domain}.npy", packed)
        heldout_tokens = len(tokenizer(held_text[domain], verbose=False)["input_ids"])
        print(
            f"{domain:12s} {len(packed):8d} training tokens, "
            f"{sum(len(text.encode()) for text in training[domain]) / len(packed):.2f} bytes each; "
            f"held out {len(held_text[domain].encode())} bytes, {heldout_tokens} tokens, {len(held[domain])} documents"
        )


if __name__ == "__main__":
    main()
