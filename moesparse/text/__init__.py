"""Text in, token windows out: calibration samples and evaluation windows from files or a `datasets` name.

A source is one of
    novel.txt                              one document (any other suffix is read as plain text too)
    pages.jsonl, .ndjson, .json            one JSON object a line, its "text" is a document
    pages.parquet                          a "text" column, one document a row
    wikitext:wikitext-2-raw-v1:train       a `datasets` name as NAME:SPLIT or NAME:CONFIG:SPLIT

A file may be packed by gzip (pages.jsonl.gz). It is UTF-8, or what its byte-order mark says: UTF-16, UTF-32.

With `chat` a record may be a chat instead ("messages", "conversations" and others, see moesparse/chats.py): the
tokenizer's own chat template makes a document of it.

Packing convention: a document is encoded as the tokenizer encodes a text for its model, so BOS goes in front where the
tokenizer puts one itself; EOS, where there is one, follows every document; then documents are laid end to end and cut
into windows. A window has no BOS of its own: it is a stretch of the stream that models are pre-trained on. A chat
record has the special tokens that its template writes and no others.
"""

from moesparse.text.encoding import DEFAULT_LENGTH, DEFAULT_SAMPLES, adds_bos, encode_document, text_hash
from moesparse.text.evaluation import evaluation_windows
from moesparse.text.packing import document_windows, domain_windows, windows
from moesparse.text.records import record_windows
from moesparse.text.sources import TextSource, named_sources, parse_source

__all__ = [
    "DEFAULT_LENGTH",
    "DEFAULT_SAMPLES",
    "TextSource",
    "adds_bos",
    "document_windows",
    "domain_windows",
    "encode_document",
    "evaluation_windows",
    "named_sources",
    "parse_source",
    "record_windows",
    "text_hash",
    "windows",
]
