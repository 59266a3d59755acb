"""Small encoders with all numbers different, and checks that one was loaded or left alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from timm.models.swin_transformer import SwinTransformer

from coupalign.errors import InputError


def swin(window=4, pixels=128, width=8, depths=(1, 1, 2, 1), classes=5, seed=0, heads=(1, 2, 4, 8)):
    torch.manual_seed(seed)
    net = SwinTransformer(
        img_size=pixels,
        window_size=window,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        num_classes=classes,
        drop_path_rate=0.0,
    )
    return randomize(net).eval()


def bert(words=50, layers=4, seed=0, pooler=False):
    torch.manual_seed(seed)
    shape = transformers.BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    return randomize(transformers.BertModel(shape, add_pooling_layer=pooler)).eval()


def randomize(net):
    """Give every number its own value, so that a swap or an omission shows.

    Norms would start as ones and zeros.
    """
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                tensor.uniform_(0.1, 0.3)
            else:
                tensor.normal_(0, 0.1)
    return net


def official(net):
    """Return the state of a timm Swin under the official names, with its derived buffers."""
    state = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        if parts[0] == "head":
            parts.remove("fc")
        state[".".join(parts)] = tensor.clone()

    for name, module in net.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"{name}.relative_position_index"] = module.relative_position_index
    state["layers.0.blocks.0.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def headless(net):
    """Take off the classifier and the final norm, as an encoder is used."""
    net.head = net.norm = torch.nn.Identity()
    return net


def snapshot(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equals_source(net, source):
    """Tell whether all tensors of `net` are those of `source`, which may have more."""
    state = source.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def assert_refused(load, net, *arguments, match):
    """Check that the load fails with this message and changes nothing; return the message."""
    before = snapshot(net)
    with pytest.raises(InputError, match=match) as caught:
        load(net, *arguments)
    assert same(before, net.state_dict()), "a refused file changed the model"
    return str(caught.value)
