"""Images for the tiny wrappers of moesparse.testing, and a processor for one of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

MARKED = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + MARKED + ""
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def record(model: Any, seed: int, length: int = 24) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids [length] of a text with one image of 16 patches, 4 tokens, in it, and what a processor gives beside them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (length,), generator=draw)
    kinds = torch.zeros(1, length, dtype=torch.int64)
    ids[seed + 3 : seed + 7] = model.config.image_token_id
    kinds[0, seed + 3 : seed + 7] = 1
    if model.config.model_type == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        seen = {"pixel_values": torch.rand(1, 16, 3 * 16, generator=draw), "image_position_ids": places}
    else:
        seen = {
            "pixel_values": torch.rand(16, 3 * 2 * 16, generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    return ids, seen | {"mm_token_type_ids": kinds}


def picture(seed: int, height: int = 16) -> Any:
    """A PIL image of noise, `height` x 16 pixels."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, 16, 3), dtype=np.uint8))


def processor(template: str | None = TEMPLATE) -> Any:
    """That of Qwen3-VL, for a vocabulary of 264 bytes and marks; without videos, which need torchvision."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class ImagesAlone(Qwen3VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = 260, 261
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(each) for each in ("<x>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return ImagesAlone(images, fast, template)
