"""Words, files and a tokenizer for the tests of text and evaluation."""

import json
import random
import shlex
import subprocess
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "over",
    "lazy",
    "dog",
    "while",
    "naïve",
    "Straße",
    "🎉",
    "owls",
    "old",
    "trees",
]


def make_tokenizer(bos: bool = True, eos: bool = True, trim_offsets: bool = False, context: int | None = None):
    """A byte-level BPE of 320 tokens, small enough that words and the characters of 🎉 are split."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS[:8])] * 20, trainer)
    template = processors.TemplateProcessing(single="<s> $A" if bos else "$A", special_tokens=[("<s>", 0)])
    offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.post_processor = processors.Sequence([offsets, template])
    specials = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    if context is not None:
        specials["model_max_length"] = context
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def prose(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice("    \n") for _ in range(words))


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_jsonl(path, documents):
    return write(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))


def run_cure(message: str) -> None:
    """Run the command that a message ends with, as a shell does."""
    command = message[message.index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, timeout=60)
