"""The whole model: every parameter learns in every variant, padding and batch splits change nothing, it learns."""

from __future__ import annotations

import itertools

import pytest
import torch

from coupalign.config.schema import (
    CoupAlignConfig,
    DecoderConfig,
    LossConfig,
    ProposalsConfig,
    RefineConfig,
    SmaConfig,
    SmallBackbone,
    SmallText,
    TimmBackbone,
    WpaConfig,
)
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.coupalign import CoupAlign

VOCABULARY, SIDE = 40, 32


def config(count: int = 3, image=None, proposal_stages=(4,), **parts) -> CoupAlignConfig:
    return CoupAlignConfig(
        image=image or SmallBackbone(widths=(8, 8, 16, 16)),
        text=SmallText(width=16, heads=2),
        decoder=DecoderConfig(width=16),
        proposals=ProposalsConfig(count=count, layers=1, heads=2, ffn=16, stages=proposal_stages),
        **parts,
    )


def inputs(batch: int = 2, side: int = SIDE, words: int = 5):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (batch, words), generator=generator)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, 3:] = False
    target = torch.zeros(batch, side, side, dtype=torch.bool)
    target[:, 4:16, 8:20] = True
    return image, tokens * mask, mask, target


PATTERNS = [
    tuple(bool(int(c)) for c in p) for p in ("0000", "1111", "1000", "0101", "0010", "0001")
]


@pytest.mark.parametrize(
    "count, stages, sentence, empty",
    [*itertools.product((0, 3), PATTERNS, ("cls", "mean"), (False, True))],
)
def test_every_trainable_parameter_gets_a_gradient(count, stages, sentence, empty):
    """Data parallelism without `find_unused_parameters` waits for ever for one that does not."""
    variant = config(count, wpa=WpaConfig(stages=stages), sma=SmaConfig(sentence=sentence))
    if not count and not any(stages):
        with pytest.raises(InputError, match="nothing in the model would read the sentence"):
            build_model(variant, VOCABULARY, SIDE)
        return
    model = build_model(variant, VOCABULARY, SIDE)
    image, words, mask, target = inputs()
    losses = model(image, words, mask, target & (not empty))
    losses["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]
    assert set(losses) == {"loss", "mask", "dice", "contrast"} and all(
        x.ndim == 0 for x in losses.values()
    )


@pytest.mark.parametrize("losses", [LossConfig(contrast=0), LossConfig(dice=0), LossConfig(mask=0)])
def test_a_loss_without_weight_leaves_no_parameter_behind(losses):
    model = build_model(config(losses=losses), VOCABULARY, SIDE)
    model(*inputs())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "darknet53"])
def test_published_encoders_train(name):
    torch.manual_seed(0)
    model = build_model(
        config(image=TimmBackbone(name=name, drop_path=0.1), proposal_stages=(3, 4)), VOCABULARY, 64
    )
    image, words, mask, target = inputs(side=64)
    model(image, words, mask, target)["loss"].backward()
    assert not [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert model(image, words, mask).shape == (2, 64, 64)


def opened(variant: CoupAlignConfig | None = None) -> CoupAlign:
    """A model whose gates are open, as after some training."""
    torch.manual_seed(0)
    model = build_model(variant or config(), VOCABULARY, SIDE).eval()
    for parameter in model.wpa.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch():
    model = (
        opened().double()
    )  # float32 rounds otherwise in other batches, by how much is the processor's
    image, words, mask, _ = inputs(3)
    together = model(image, words, mask)
    padded = model(
        image, torch.nn.functional.pad(words, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
    )
    torch.testing.assert_close(together, padded, rtol=1e-5, atol=1e-5)
    for i in range(3):
        alone = model(image[i : i + 1], words[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_sentence_matters_once_the_gates_are_open():
    model = opened()
    image, words, mask, _ = inputs()
    assert not torch.allclose(
        model(image, words, mask), model(image, words.flip(0), mask.flip(0)), atol=1e-4
    )


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    model = opened().double()
    image, words, mask, target = inputs(4)
    gradients = []
    for size in (4, 2):
        model.zero_grad()
        for i in range(0, 4, size):
            (
                model(
                    image[i : i + size],
                    words[i : i + size],
                    mask[i : i + size],
                    target[i : i + size],
                )["loss"]
                * size
                / 4
            ).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for (name, _), a, b in zip(model.named_parameters(), *gradients):
        assert (a - b).norm() <= 1e-5 * max(a.norm().item(), 1e-4), name


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_plain_and_absorbed_models_agree(impl):
    want = opened()(*inputs()[:3])
    got = opened(config(wpa=WpaConfig(impl=impl)))(*inputs()[:3])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_bf16_autocast_is_near_fp32_and_keeps_float32_logits():
    model = opened()
    image, words, mask, target = inputs()
    want = model(image, words, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got, losses = model(image, words, mask), model(image, words, mask, target)
    assert got.dtype == losses["loss"].dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


def test_constants_are_not_part_of_a_checkpoint():
    assert not {"mean", "std"} & set(build_model(config(), VOCABULARY, SIDE).state_dict())


@pytest.mark.parametrize(
    "variant, message",
    [
        (config(proposal_stages=(5,)), "names stage 5"),
        (config(proposal_stages=()), "stages is empty"),
        (config(wpa=WpaConfig(heads=3)), "heads = 3"),
        (config(wpa=WpaConfig(impl="fused")), "impl = fused: out of order"),
    ],
)
def test_fields_that_do_not_fit_are_named(variant, message, monkeypatch):
    monkeypatch.setattr("coupalign.kernels.obstacle", lambda: "out of order")
    with pytest.raises(InputError, match=message):
        build_model(variant, VOCABULARY, SIDE)


def test_it_learns_to_tell_two_sentences_apart():
    """The same picture, two words, two objects: only a model that reads can lower the loss of both."""
    torch.manual_seed(0)
    model = build_model(config(), VOCABULARY, SIDE)
    image, _, _, target = inputs()
    image[:] = image[:1]
    words, mask = torch.tensor([[1, 7, 2], [1, 8, 2]]), torch.ones(2, 3, dtype=torch.bool)
    target[:] = False
    target[0, 4:16, 4:16], target[1, 16:28, 16:28] = True, True
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(image, words, mask, target)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    predicted = model(image, words, mask) > 0
    assert (predicted & target).sum() / (predicted | target).sum() > 0.7


def test_refinement_decides_only_the_least_certain_pixels_and_starts_at_nothing():
    torch.manual_seed(0)
    model = opened(config(refine=RefineConfig(points=7)))
    image, words, mask, target = inputs()
    plain = model.config.model_copy(update={"refine": RefineConfig()})
    before = build_model(plain, VOCABULARY, SIDE).eval()
    before.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("refine.")
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(image, words, mask), before(image, words, mask), rtol=0, atol=0
        )
        model.refine.decide[-1].bias += 1.0
        coarse, refined = before(image, words, mask), model(image, words, mask)
    for one, other in zip(coarse.flatten(1), refined.flatten(1)):
        changed = (one != other).nonzero().flatten().tolist()
        assert sorted(changed) == sorted(one.abs().topk(7, largest=False).indices.tolist())
        torch.testing.assert_close(other[changed], one[changed] + 1.0)
    losses, others = model(image, words, mask, target), before(image, words, mask, target)
    assert losses["points"] > 0 and set(losses) == {"loss", "mask", "dice", "contrast", "points"}
    losses["loss"].backward()
    others["loss"].backward()
    expected = {name: p.grad for name, p in before.named_parameters()}
    for name, p in model.named_parameters():
        if not name.startswith("refine."):
            torch.testing.assert_close(
                p.grad, expected[name], rtol=0, atol=0, msg=f"{name} learns from the points"
            )
    assert model.refine.decide[-1].bias.grad.abs() > 0


def test_a_point_sees_the_colors_around_it():
    """Against a loop over the points, with the edge repeated."""
    from coupalign.model.refine import _around

    colors = torch.randn(2, 5, 5, 3, generator=torch.Generator().manual_seed(0))
    y, x = torch.tensor([[0, 4, 2], [3, 0, 1]]), torch.tensor([[0, 4, 3], [1, 2, 0]])
    found = _around(colors, y, x)
    for b in range(2):
        for k in range(3):
            expected = [
                colors[b, min(max(int(y[b, k]) + i, 0), 4), min(max(int(x[b, k]) + j, 0), 4)]
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
            torch.testing.assert_close(found[b, k], torch.cat(expected))


def test_how_the_image_lies_in_memory_changes_no_bit():
    """The loader's batches are channels last."""
    torch.manual_seed(0)
    model = build_model(config(), VOCABULARY, SIDE).eval()
    image, words, mask, _ = inputs()
    assert torch.equal(
        model(image, words, mask), model(image.to(memory_format=torch.channels_last), words, mask)
    )
