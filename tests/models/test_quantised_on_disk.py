"""A quantised checkpoint read layer by layer is the model that transformers dequantises, to the bit."""

import pytest
import torch
from quantised_folders import BY_COMPRESSED_TENSORS, BY_TRANSFORMERS, dequantised, write_quantised

from moesparse.models.layers import RunOptions
from moesparse.models.on_disk import LayersOnDisk


def whole(folder):
    """The state of a folder, read layer by layer."""
    layers = LayersOnDisk(folder).open()
    state = {name: layers.model.state_dict()[name] for name in layers.outside}
    for position in range(len(layers)):
        with layers.hold(position):
            state |= {name: tensor.clone() for name, tensor in layers.state(position).items()}
    return state


@pytest.mark.parametrize("case", BY_TRANSFORMERS + BY_COMPRESSED_TENSORS)
def test_the_layers_are_those_that_transformers_dequantises(case, tmp_path):
    if case in BY_COMPRESSED_TENSORS:
        pytest.importorskip("compressed_tensors")
    folder = write_quantised(tmp_path / "model", case)
    model, ours = dequantised(folder), whole(folder)
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        model.load_state_dict(ours)
        assert model(ids).logits.equal(want)
        assert want.isfinite().all()


@pytest.mark.parametrize("case", ["fp8 deepseek", "fp8 qwen", "mxfp4", "int4"])
def test_text_through_the_layers_gives_its_logits(case, tmp_path):
    if case in BY_COMPRESSED_TENSORS:
        pytest.importorskip("compressed_tensors")
    folder = write_quantised(tmp_path / "model", case)
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    layers = LayersOnDisk(folder).open()
    with torch.no_grad():
        stream = layers.stream(ids, None, RunOptions(batch_size=2))
        for position in range(len(layers)):
            with layers.hold(position):
                for _ in stream.run(position, keep=True):
                    pass
        found = layers.model.lm_head(layers.model.model.norm(torch.cat(list(stream.hidden))))
        wanted = dequantised(folder)(ids).logits
    # bfloat16 products may be summed in another order: two roundings of the largest
    assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()
