"""LAVT, VLT and LTS: every parameter learns, padding and batch splits change nothing, each learns to read; LAVT against its words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coupalign.config.load import read_config
from coupalign.config.schema import LavtConfig, LtsConfig, ModelConfig, TimmBackbone, VltConfig
from coupalign.errors import InputError
from coupalign.model.baselines.blocks import SentenceFusion
from coupalign.model.baselines.lavt import LanguageGate, PixelWordAttention
from coupalign.model.baselines.lts import location_loss
from coupalign.model.build import build_model

VOCABULARY, SIDE = 40, 64
ENCODERS = {
    "image": {"kind": "small", "widths": (16, 16, 24, 32)},
    "text": {"kind": "small", "width": 16, "heads": 2},
}
RIVALS = {
    "lavt": LavtConfig.model_validate({**ENCODERS, "decoder": {"width": 16}}),
    "vlt": VltConfig.model_validate(
        {**ENCODERS, "transformer": {"count": 3, "width": 16, "heads": 2, "ffn": 32}}
    ),
    "lts": LtsConfig.model_validate({**ENCODERS, "segment": {"width": 16}}),
}
rivals = pytest.mark.parametrize("kind", RIVALS)


def build(config: ModelConfig, side: int = SIDE):
    torch.manual_seed(0)
    return build_model(config, VOCABULARY, side)


def inputs(batch: int = 2, side: int = SIDE, words: int = 5):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (batch, words), generator=generator)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, 3:] = False
    target = torch.zeros(batch, side, side, dtype=torch.bool)
    target[:, 4:16, 8:20] = True
    return image, tokens * mask, mask, target


def without_gradient(model: nn.Module) -> list[str]:
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("side", [32, 96])
@rivals
def test_every_trainable_parameter_gets_a_gradient(kind, side, empty):
    """Data parallelism without `find_unused_parameters` waits for ever for one that does not."""
    model = build(RIVALS[kind], side)
    image, words, mask, target = inputs(side=side)
    losses = model(image, words, mask, target & (not empty))
    losses["loss"].backward()
    assert not without_gradient(model)
    assert set(losses) == {"loss", "mask", "dice"} | ({"locate"} if kind == "lts" else set())
    logits = model.eval()(image, words, mask)
    assert logits.shape == (2, side, side) and logits.dtype == torch.float32


@rivals
def test_published_encoders_train(kind):
    model = build(RIVALS[kind].model_copy(update={"image": TimmBackbone(name="darknet53")}))
    model(*inputs())["loss"].backward()
    assert not without_gradient(model)


@rivals
def test_padding_and_the_rest_of_the_batch_have_no_influence(kind):
    model = (
        build(RIVALS[kind]).eval().double()
    )  # double also the means, so that only the order of sums is left
    image, words, mask, _ = inputs(3)
    together = model(image, words, mask)
    other = torch.where(mask, words, torch.randint_like(words, 1, VOCABULARY))
    assert torch.equal(model(image, other, mask), together), "what stands at a padded place matters"
    longer = model(image, F.pad(words, (0, 4), value=7), F.pad(mask, (0, 4)))
    torch.testing.assert_close(longer, together, rtol=1e-6, atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(
            model(image[i : i + 1], words[i : i + 1], mask[i : i + 1]),
            together[i : i + 1],
            rtol=1e-6,
            atol=1e-6,
        )


@rivals
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind):
    """LAVT has BatchNorm, so this is true of it where the statistics stand still."""
    model = build(RIVALS[kind]).double().train(kind != "lavt")
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
    for (name, _), whole, split in zip(model.named_parameters(), *gradients):
        # losses and logits are float32: their rounding is all that may differ, beside gradients that are zero but for it
        assert (whole - split).norm() <= 1e-4 * max(whole.norm().item(), 1e-3), name


def test_only_lavt_has_batch_norm():
    has = {
        kind: any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in build(config).modules())
        for kind, config in RIVALS.items()
    }
    assert has == {"lavt": True, "vlt": False, "lts": False}


@rivals
def test_bf16_autocast_is_near_fp32_and_keeps_float32_logits(kind):
    model = build(RIVALS[kind]).eval()
    image, words, mask, target = inputs()
    want = model(image, words, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got, losses = model(image, words, mask), model(image, words, mask, target)
    assert got.dtype == losses["loss"].dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()


@rivals
def test_it_learns_to_tell_two_sentences_apart(kind):
    """The same picture, two words, two objects: only a model that reads can lower the loss of both."""
    model = build(RIVALS[kind])
    image, _, _, target = inputs()
    image[:] = image[:1]
    words, mask = torch.tensor([[1, 7, 2], [1, 8, 2]]), torch.ones(2, 3, dtype=torch.bool)
    target[:] = False
    target[0, 4:28, 4:28], target[1, 32:60, 32:60] = True, True
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(40):
        losses = model(image, words, mask, target)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses["loss"].item())
    assert history[-1] < history[0] / 2
    predicted = model(image, words, mask) > 0
    assert (predicted & target).sum() / (predicted | target).sum() > 0.6
    swapped = model(image, words.flip(0), mask) > 0
    assert (swapped & target).sum() < (predicted & target).sum() / 2, (
        "the mask does not follow the sentence"
    )


# --------------------------------------------------------------------------------------------------------------- LAVT


def attended_slowly(attention: PixelWordAttention, pixels, words, word_mask):
    """METHOD section 4 word for word, a sample, a pixel and a word at a time."""

    def linear(layer, x):
        return layer.weight @ x + layer.bias

    def normalized(columns):  # InstanceNorm: [C, P], over the pixels
        mean = columns.mean(1, keepdim=True)
        return (columns - mean) / ((columns - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    out = torch.zeros_like(pixels)
    for sample in range(len(pixels)):
        real = [t for t in range(words.shape[1]) if word_mask[sample, t]]
        keys = [linear(attention.key, words[sample, t]) for t in real]
        values = [linear(attention.value, words[sample, t]) for t in real]
        query = normalized(
            torch.stack([linear(attention.query, pixel) for pixel in pixels[sample]], 1)
        )
        read = []
        for p in range(pixels.shape[1]):
            scores = torch.stack(
                [(query[:, p] * key).sum() / math.sqrt(pixels.shape[2]) for key in keys]
            ).exp()
            read.append(sum(score * value for score, value in zip(scores / scores.sum(), values)))
        message = normalized(torch.stack([linear(attention.out, each) for each in read], 1))
        for p in range(pixels.shape[1]):
            seen = gelu(linear(attention.project, pixels[sample, p])) * message[:, p]
            out[sample, p] = gelu(linear(attention.mix, seen))
    return out


@torch.no_grad()
def test_lavts_attention_is_what_its_words_say():
    torch.manual_seed(0)
    attention = PixelWordAttention(channels=6, word_width=5)
    pixels, words = torch.randn(2, 12, 6), 3 * torch.randn(2, 4, 5)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    slow = attended_slowly(attention.double(), pixels.double(), words.double(), mask)
    fast = attention.float()(pixels, words * mask[..., None], mask)
    assert slow.std() > 0.01
    torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lavts_gate_is_what_its_words_say():
    torch.manual_seed(0)
    gate, pixels, message = LanguageGate(3), torch.randn(1, 2, 2, 3), 3 * torch.randn(1, 2, 2, 3)
    first, last = gate.gate[0].weight, gate.gate[2].weight
    for y, x in itertools.product(range(2), range(2)):
        v, f = pixels[0, y, x], message[0, y, x]
        torch.testing.assert_close(
            gate(pixels, message)[0, y, x], v + torch.tanh(last @ (first @ f).clamp(min=0)) * f
        )


# ------------------------------------------------------------------------------------------------------------ VLT, LTS


@pytest.mark.parametrize("act", [torch.tanh, torch.relu])
@torch.no_grad()
def test_the_sentence_is_multiplied_into_three_stages(act):
    torch.manual_seed(0)
    fusion = SentenceFusion((3, 4, 5), 6, 8, act)
    stages, sentence = (
        [torch.randn(1, side, side, c) for side, c in ((8, 3), (4, 4), (2, 5))],
        torch.randn(1, 6),
    )
    met = []
    for see, say, stage in zip(fusion.pixels, fusion.sentences, stages):
        pixels = act(F.layer_norm(stage @ see[0].weight.T + see[0].bias, (8,)))
        met.append(
            (pixels * act(F.layer_norm(say[0].weight @ sentence[0] + say[0].bias, (8,)))).permute(
                0, 3, 1, 2
            )
        )
    halved = met[0].unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    doubled = F.interpolate(met[2], scale_factor=2, mode="bilinear")
    together = torch.cat([halved, met[1], doubled], 1)
    assert torch.allclose(
        fusion(stages, sentence), F.relu(fusion.smooth(fusion.mix(together))), atol=1e-5
    )


@torch.no_grad()
def test_vlts_queries_are_the_words_as_a_view_weights_them():
    torch.manual_seed(0)
    model = build(RIVALS["vlt"])
    generation, mask = model.generation, torch.tensor([[True, True, True, False]])
    fused, words = torch.randn(1, 16, SIDE // 16, SIDE // 16), torch.randn(1, 4, 16)
    queries, views = generation(fused, words, mask)[0], generation.views(fused)[0]
    for n in range(3):
        asked = torch.tanh(generation.ask(views[n].flatten()))
        scores = [
            float(asked @ torch.tanh(generation.answer(word))) / 4 for word in words[0, :3]
        ]  # 4: the root of d
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        expected = sum(
            weight * torch.tanh(generation.carry(word))
            for weight, word in zip(weights, words[0, :3])
        )
        torch.testing.assert_close(queries[n], expected)


def test_vlts_width_must_fit_its_heads():
    wrong = VltConfig.model_validate({**ENCODERS, "transformer": {"width": 20, "heads": 8}})
    with pytest.raises(
        InputError,
        match="model.transformer.width = 20 must be a multiple of 4 and of model.transformer.heads = 8",
    ):
        build(wrong)


def test_vlts_queries_depend_on_the_image():
    """The same sentence is weighted anew for each picture."""
    model = build(RIVALS["vlt"])
    words, mask = torch.randn(1, 5, 16).expand(2, -1, -1), torch.ones(2, 5, dtype=torch.bool)
    queries = model.generation(torch.randn(2, 16, SIDE // 16, SIDE // 16), words, mask)
    assert queries.shape == (2, 3, 16) and not torch.allclose(queries[0], queries[1], atol=1e-5)
    assert not torch.allclose(queries[0, 0], queries[0, 1], atol=1e-5), "all queries are one"


def test_ltss_heat_map_is_held_to_the_share_of_the_object_in_a_cell():
    target = torch.zeros(1, 32, 32, dtype=torch.bool)
    target[0, :16, :8] = True  # half of the first of four cells
    share = torch.tensor([0.5, 0, 0, 0]).view(1, 1, 2, 2)
    heat = torch.randn(1, 1, 2, 2)
    p = heat.sigmoid()
    assert torch.allclose(
        location_loss(heat, target), -(share * p.log() + (1 - share) * (1 - p).log()).mean()
    )
    model = build(RIVALS["lts"])
    losses = model(*inputs())
    assert torch.allclose(losses["loss"], losses["mask"] + losses["locate"])


@rivals
def test_a_rival_is_one_override_away(kind, tmp_path):
    (tmp_path / "run.yaml").write_text("""
model:
  image: {kind: timm, name: darknet53}
  text: {kind: small, width: 48}
  decoder: {width: 64}
  losses: {contrast: 0.3, foreground: 3.0}
""")
    model = read_config(tmp_path / "run.yaml", [f"model.kind={kind}"]).model
    encoders = {
        "image": {"kind": "timm", "name": "darknet53"},
        "text": {"kind": "small", "width": 48},
    }
    assert model == type(RIVALS[kind]).model_validate(encoders)
    changed = read_config(
        tmp_path / "run.yaml", [f"model.kind={kind}", "model.losses.dice=1"]
    ).model
    assert changed.losses.dice == 1 and changed.losses.foreground == (
        1.1 if kind == "lavt" else 1.0
    )
