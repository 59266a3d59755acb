"""The whole configuration: every setting with its unit, its default and what it does, in one file.

Variants are discriminated unions on `kind`, so code can `match` on the type. Values are frozen.
`config.load` refuses unknown keys and names the file, the key and the nearest valid one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from coupalign.addresses import find_secret, hide_secret

# More than any machine can use, and few enough that a typing error ends in a message.
MOST_CHANNELS = 65_536
MOST_SAMPLES = 1_000_000
MOST_PIXELS = 8_192
MOST_STEPS = 1_000_000_000
MOST_EPOCHS = 1_000_000

# Names of files have at most 255 bytes; some of ours add an ending.
MOST_NAME_BYTES = 200


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know. Numbers are finite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        # A refused address is not repeated.
        hide_input_in_errors=True,
    )


def _without_secret(address: str) -> str:
    """Refuse an address that holds a password or token, without repeating it."""
    if secret := find_secret(address):
        raise ValueError(
            f"the address holds {secret}, and it is written into files that others see. Leave it "
            "out, and give the login in ~/.netrc (web servers), ~/.pgpass or MLFLOW_TRACKING_URI "
            "(tracking databases), MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN (tracking servers), or the AWS variables (s3://)"
        )
    return address


# A path, a hub name or an address; see the field.
Address = Annotated[str, Field(min_length=1), AfterValidator(_without_secret)]


def _is_not_empty(path: Any) -> Any:
    if path == "":
        raise ValueError("an empty path; leave the key out, or write . for the working directory")
    return path


# A folder. Python takes the empty string for the working directory.
Folder = Annotated[Path, BeforeValidator(_is_not_empty)]


def _is_plain_name(name: str) -> str:
    if not re.fullmatch(r"[\w+][\w.+-]*", name):
        raise ValueError(
            f"expected letters, digits and any of _ . + - in a name that does not begin with . "
            f"or -, found {hide_secret(name)[:80]!r}"
        )
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"longer than {MOST_NAME_BYTES} bytes, which a folder's name may not be")
    return name


# The name of a folder in another one: never `..`, a hidden folder, or an option's spelling.
PlainName = Annotated[str, AfterValidator(_is_plain_name)]

# Sizes of a model.
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS, strict=True)]


def setting(
    default: Any = ...,
    description: str = "",
    *,
    numeric: bool = True,
    resumable: bool | None = None,
    **constraints: Any,
) -> Any:
    """Declare a field of a section.

    Args:
        default: the value without a configuration; `...` makes the field required.
        description: what the setting does, with its unit; for documentation and error messages.
        numeric: whether another value can lead to other weights or other scores, beyond rounding.
        resumable: whether a run may resume from its checkpoint with another value.
            Default: only if the field is not numeric. `train.steps` is both numeric and resumable.
        constraints: passed to pydantic's `Field`, such as `ge=0`.

    On a field that holds a section, numeric=False and resumable=True hold for all of the section.
    """
    # `true` is no number, although Python takes it for one.
    if constraints.keys() & {"ge", "gt", "le", "lt"}:
        constraints.setdefault("strict", True)
    effects = {"numeric": numeric, "resumable": not numeric if resumable is None else resumable}
    return Field(default, description=description, json_schema_extra=effects, **constraints)


# ---------------------------------------------------------------------------------------------
# Data


class Source(Section):
    """One split of one data set inside a directory of packed shards."""

    index: Address = setting(
        description="Shard directory or its index.json: a local path, http(s):// or s3:// address."
    )
    dataset: str | None = setting(
        None, "refcoco, refcoco+, refcocog, refshapes … Null: every data set in the index."
    )
    split_by: str | None = setting(
        None, "Partition: unc, google, umd … Null: every partition in the index."
    )
    split: str = setting(description="train, val, testA, testB, test …")


class Augmentation(Section):
    """Random changes of training samples. Each is off at 0."""

    flip: float = setting(
        0.0,
        "Probability of mirroring the image and swapping left and right in the sentence.",
        ge=0,
        le=1,
    )
    color_jitter: float = setting(
        0.0,
        "Strength of brightness, contrast and saturation changes. "
        "Skipped when the sentence names a color.",
        ge=0,
        le=1,
    )


class DataConfig(Section):
    """What a run trains on and is scored on, and how samples are read."""

    train: tuple[Source, ...] = setting(
        (), "Sources to train on. Every sample is used once per epoch."
    )
    evaluate: tuple[Source, ...] = setting(
        (), "Sources to score during and after training.", numeric=False
    )
    image_size: int = setting(
        480, "Side of the square model input, in pixels.", ge=32, le=MOST_PIXELS
    )
    resize: Literal["squash", "letterbox"] = setting(
        "squash",
        "How an image becomes square. squash: ignore the aspect ratio. letterbox: keep it and pad.",
    )
    leaks: Literal["refuse", "exclude", "allow"] = setting(
        "refuse",
        "What to do with training samples on photographs that are also scored. refuse: do not "
        "train. exclude: leave these samples out. allow: train on them, for comparison with "
        "papers that do; every score then says so.",
    )
    unit: Literal["ref", "sentence"] = setting(
        "ref",
        "What one training sample is: ref (a ref with one random sentence of it per epoch) or "
        "sentence (every sentence is a sample).",
    )
    sentence: Literal["cleaned", "raw"] = setting(
        "cleaned", "Text of an annotation to read: cleaned (its `sent`) or raw (its `raw`)."
    )
    tokenizer: Address | None = setting(
        None,
        "Folder or hub name of a Hugging Face tokenizer. "
        "Null: the vocabulary trained while the first training source was packed.",
        resumable=True,
    )
    max_tokens: int = setting(
        20, "Length that sentences are cut to, in tokens, including [CLS] and [SEP].", ge=3, le=4096
    )
    augment: Augmentation = Augmentation()
    shuffle_window: int = setting(
        256, "Number of shards whose samples are shuffled together.", ge=1, le=MOST_SAMPLES
    )
    canonical_nodes: int = setting(
        1,
        "Number of equal parts that each epoch is divided into; a node reads one or more of them. "
        "Choose a common multiple of all numbers of nodes you may use: changing it later changes "
        "the data order.",
        ge=1,
        le=65_536,
    )
    workers: int = setting(
        2,
        "Processes per rank that read and decode samples. Does not affect the data order.",
        numeric=False,
        ge=0,
        le=1024,
    )
    cache_dir: Folder | None = setting(
        None, "Folder for copies of remote shards. Null: the user's cache folder.", numeric=False
    )
    cache_gb: float = setting(
        100.0, "Maximum size of this cache, in GB (1e9 bytes).", numeric=False, gt=0
    )
    bad_samples: Literal["fail", "skip"] = setting(
        "fail",
        "What to do with an unreadable sample: fail stops the run; skip counts it, logs its name "
        "and continues.",
    )
    max_bad_share: float = setting(
        0.01, "With bad_samples: skip, stop if more than this share is unreadable.", ge=0, le=1
    )


# ---------------------------------------------------------------------------------------------
# Model


Checkpointing = Literal[False, True, "selective"]


def _checkpointing() -> Any:
    return setting(
        False,
        "Recompute activations in the backward pass to save memory. true: all of them. selective: "
        "only the cheap ones, not those of matrix products, convolutions and attention.",
        numeric=False,
    )


class TimmBackbone(Section):
    """A published image encoder, by its timm name."""

    kind: Literal["timm"] = "timm"
    name: str = setting(
        "swin_base_patch4_window12_384", "timm name: swin_*, resnet101* or darknet53."
    )
    weights: Address | None = setting(
        None,
        "Pretrained weights: a local file (official Swin .pth, timm, torchvision or Darknet), "
        "a hub name, or 'hub' for timm's own. Null: random start.",
        resumable=True,
    )
    drop_path: float = setting(
        0.0, "Swin only: probability of stochastic depth in the last block.", ge=0, lt=1
    )
    slope: float = setting(
        0.01,
        "Darknet only: slope of the leaky rectifiers below zero. "
        "Use 0.01 with timm's weights, 0.1 with Darknet's own.",
        ge=0,
        lt=1,
    )
    freeze_norm: bool = setting(
        True, "ResNet and Darknet only: keep BatchNorm statistics and scales as loaded."
    )
    checkpointing: Checkpointing = _checkpointing()


class SmallBackbone(Section):
    """A small image encoder for the CPU: residual 3x3 convolutions at strides 4, 8, 16 and 32."""

    kind: Literal["small"] = "small"
    widths: tuple[Channels, Channels, Channels, Channels] = setting(
        (32, 64, 96, 128), "Channels of the four stages."
    )
    depths: tuple[Channels, Channels, Channels, Channels] = setting(
        (1, 1, 1, 1), "Blocks of the four stages."
    )
    checkpointing: Checkpointing = _checkpointing()


class BertText(Section):
    """A published BERT, by its Hugging Face files."""

    kind: Literal["bert"] = "bert"
    weights: Address = setting(
        "bert-base-uncased",
        "Hugging Face folder or hub name. random:FOLDER_OR_NAME takes the shape of that model and "
        "starts from random weights.",
        resumable=True,
    )
    dropout: float = setting(0.1, "Dropout probability.", ge=0, lt=1)
    checkpointing: Checkpointing = _checkpointing()


class SmallText(Section):
    """A small BERT from a random start. Its vocabulary is the tokenizer's."""

    kind: Literal["small"] = "small"
    width: int = setting(128, "Channels.", ge=8, le=MOST_CHANNELS)
    layers: int = setting(
        4, "Transformer layers, divided into four groups, one per image stage.", ge=4, le=1024
    )
    heads: int = setting(4, "Attention heads.", ge=1, le=MOST_CHANNELS)
    dropout: float = setting(0.0, "Dropout probability.", ge=0, lt=1)
    checkpointing: Checkpointing = _checkpointing()


class WpaConfig(Section):
    """Word-pixel alignment: attention in both directions from one score matrix."""

    stages: tuple[bool, bool, bool, bool] = setting(
        (True, True, True, True), "Whether words and pixels are aligned after each image stage."
    )
    heads: int = setting(1, "Attention heads.", ge=1, le=MOST_CHANNELS)
    impl: Literal["auto", "reference", "plain", "fused"] = setting(
        "auto",
        "fused: our GPU kernels. reference: the same formula in PyTorch. auto: fused where the "
        "kernels run, else reference. plain: PyTorch as the paper writes it, the tests' oracle.",
        numeric=False,
    )


class DecoderConfig(Section):
    """CoupAlign's pixel decoder."""

    width: int = setting(
        256, "d: channels of the decoder and of the mask embeddings.", ge=8, le=MOST_CHANNELS
    )
    depth: int = setting(1, "3x3 convolutions per level.", ge=1, le=MOST_CHANNELS)


class ProposalsConfig(Section):
    """The mask generator: a transformer decoder that turns queries into mask embeddings."""

    count: int = setting(
        100,
        "N: number of mask embeddings. 0 disables sentence-mask alignment.",
        ge=0,
        le=MOST_CHANNELS,
    )
    layers: int = setting(3, "Transformer layers.", ge=1, le=MOST_CHANNELS)
    heads: int = setting(8, "Attention heads.", ge=1, le=MOST_CHANNELS)
    ffn: int = setting(2048, "Width of the feed-forward layers.", ge=8, le=MOST_CHANNELS)
    dropout: float = setting(0.0, "Dropout probability.", ge=0, lt=1)
    stages: tuple[Annotated[int, Field(ge=1, le=4, strict=True)], ...] = setting(
        (4,), "Image stages (1 to 4) whose aligned features the queries attend to."
    )


class SmaConfig(Section):
    """Sentence-mask alignment."""

    scaled: bool = setting(
        False, "Divide Q . Y by sqrt(d) before the sigmoid, so that it does not start saturated."
    )


class MaskLossConfig(Section):
    """The losses of the predicted mask. All methods have them."""

    mask: float = setting(1.0, "Weight of the cross-entropy.", ge=0)
    foreground: float = setting(1.1, "Weight of foreground pixels in the cross-entropy.", gt=0)
    background: float = setting(0.9, "Weight of background pixels in the cross-entropy.", gt=0)
    dice: float = setting(0.0, "Weight of the Dice loss.", ge=0)
    boundary: float = setting(
        0.0, "Weight of the boundary loss: 1 - F1 of predicted and true boundary.", ge=0
    )


class LossConfig(MaskLossConfig):
    """CoupAlign's losses: with an auxiliary contrast between foreground and background pixels."""

    dice: float = setting(1.0, "Weight of the Dice loss.", ge=0)
    contrast: float = setting(0.1, "Weight of the auxiliary foreground/background contrast.", ge=0)
    temperature: float = setting(0.1, "Temperature of the contrast.", gt=0)
    contrast_samples: int = setting(
        256,
        "Foreground pixels, and as many background pixels, drawn per image.",
        ge=1,
        le=MOST_SAMPLES,
    )


class RefineConfig(Section):
    """Point-wise refinement: decide the least certain pixels of the full-size mask again."""

    points: int = setting(
        0, "Pixels to refine per image. 0 disables refinement.", ge=0, le=MOST_SAMPLES
    )
    width: int = setting(
        64, "Channels of the two hidden layers that decide a pixel.", ge=8, le=MOST_CHANNELS
    )


class EncodersConfig(Section):
    """The encoders. All methods have them, so a configuration changes method in one line."""

    image: Annotated[Union[TimmBackbone, SmallBackbone], Field(discriminator="kind")] = (
        TimmBackbone()
    )
    text: Annotated[Union[BertText, SmallText], Field(discriminator="kind")] = BertText()


class CoupAlignConfig(EncodersConfig):
    """CoupAlign (NeurIPS 2022)."""

    kind: Literal["coupalign"] = "coupalign"
    wpa: WpaConfig = WpaConfig()
    decoder: DecoderConfig = DecoderConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    sma: SmaConfig = SmaConfig()
    refine: RefineConfig = RefineConfig()
    losses: LossConfig = LossConfig()


class WideDecoderConfig(Section):
    """LAVT's decoder."""

    width: int = setting(512, "Channels of the decoder.", ge=8, le=MOST_CHANNELS)


class LavtConfig(EncodersConfig):
    """LAVT (CVPR 2022), our re-implementation. Set losses.dice=1 for its authors' later recipe."""

    kind: Literal["lavt"] = "lavt"
    decoder: WideDecoderConfig = WideDecoderConfig()
    losses: MaskLossConfig = MaskLossConfig()


class EvenMaskLossConfig(MaskLossConfig):
    """As published for VLT and LTS: all pixels have the same weight."""

    foreground: float = setting(1.0, "Weight of foreground pixels in the cross-entropy.", gt=0)
    background: float = setting(1.0, "Weight of background pixels in the cross-entropy.", gt=0)


class VltTransformerConfig(Section):
    """VLT's queries and its transformer."""

    count: int = setting(16, "Queries generated per sentence.", ge=1, le=MOST_CHANNELS)
    width: int = setting(
        256, "Channels of queries, pixels and mask decoder.", ge=8, le=MOST_CHANNELS
    )
    encoder_layers: int = setting(2, "Transformer encoder layers.", ge=1, le=MOST_CHANNELS)
    decoder_layers: int = setting(2, "Transformer decoder layers.", ge=1, le=MOST_CHANNELS)
    heads: int = setting(8, "Attention heads.", ge=1, le=MOST_CHANNELS)
    ffn: int = setting(1024, "Width of the feed-forward layers.", ge=8, le=MOST_CHANNELS)
    dropout: float = setting(0.0, "Dropout probability.", ge=0, lt=1)


class VltConfig(EncodersConfig):
    """VLT (ICCV 2021), our re-implementation. A baseline of Table 2, with Darknet-53."""

    kind: Literal["vlt"] = "vlt"
    transformer: VltTransformerConfig = VltTransformerConfig()
    losses: EvenMaskLossConfig = EvenMaskLossConfig()


class LtsSegmentConfig(Section):
    """LTS's fused map and its segmentation network."""

    width: int = setting(
        256, "Channels of the fused map and of the segmentation network.", ge=8, le=MOST_CHANNELS
    )
    dilations: tuple[Annotated[int, Field(ge=1, le=MOST_PIXELS, strict=True)], ...] = setting(
        (1, 3, 5), "Dilations of the parallel 3x3 convolutions.", min_length=1
    )


class LtsLossConfig(EvenMaskLossConfig):
    """LTS's losses: with one for the heat map that locates the object."""

    locate: float = setting(1.0, "Weight of the heat map's loss.", ge=0)


class LtsConfig(EncodersConfig):
    """LTS (CVPR 2021), our re-implementation. A baseline of Table 2, with Darknet-53."""

    kind: Literal["lts"] = "lts"
    segment: LtsSegmentConfig = LtsSegmentConfig()
    losses: LtsLossConfig = LtsLossConfig()


ModelConfig = Annotated[
    Union[CoupAlignConfig, LavtConfig, VltConfig, LtsConfig], Field(discriminator="kind")
]


# ---------------------------------------------------------------------------------------------
# Training


Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


class OptimConfig(Section):
    """AdamW. Norms, biases, position tables, queries and gates have no weight decay."""

    impl: Literal["torch", "apex"] = setting(
        "torch", "torch: PyTorch's fused AdamW. apex: NVIDIA's FusedAdam, which must be installed."
    )
    lr_image: float = setting(5e-5, "Peak learning rate of the image encoder.", ge=0)
    lr_text: float = setting(5e-5, "Peak learning rate of the text encoder.", ge=0)
    lr_proposals: float | None = setting(
        None,
        "CoupAlign only: peak learning rate of the mask generator and of sentence-mask alignment. "
        "Null: the same as `lr`.",
        ge=0,
    )
    lr: float = setting(5e-5, "Peak learning rate of everything else.", ge=0)
    betas: tuple[Decay, Decay] = setting((0.9, 0.999), "Decay of the two moment estimates.")
    eps: float = setting(1e-8, "Added to the denominator for numerical stability.", gt=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay.", ge=0)
    layer_decay: float = setting(
        1.0,
        "Each encoder block's learning rate is this factor times that of the next (deeper) block. "
        "1.0 disables layer-wise decay.",
        gt=0,
        le=1,
    )
    clip_norm: float | None = setting(
        None, "Maximum norm of the whole gradient. Null: no clipping.", gt=0
    )


class ScheduleConfig(Section):
    """Learning rate over the run, relative to its peak."""

    kind: Literal["poly", "cosine"] = setting(
        "poly", "Curve from the end of the warm-up down to `final`."
    )
    power: float = setting(0.9, "poly only: exponent of the curve.", gt=0, le=1000)
    warmup_steps: int = setting(0, "Steps of the linear rise to the peak.", ge=0, le=MOST_STEPS)
    final: float = setting(
        0.0,
        "Share of the peak learning rate at the end of the run. 1.0 keeps the rate constant.",
        ge=0,
        le=1,
    )


class EmaConfig(Section):
    """An exponential moving average of the weights, which is then scored instead of them."""

    decay: float = setting(
        0.999,
        "Decay per step. Early steps use (1 + step) / (10 + step) while it is smaller.",
        gt=0,
        lt=1,
    )


class TrainConfig(Section):
    """Length of the run, batch size, and what happens at which step."""

    global_batch: int = setting(
        32,
        "Samples per optimizer step over all ranks. There is no other batch size to set.",
        ge=1,
        le=MOST_SAMPLES,
    )
    max_micro_batch: int | None = setting(
        None,
        "Maximum number of samples per rank and pass; gradients are accumulated over as many "
        "passes as needed. Null: all samples of a step in one pass.",
        numeric=False,
        ge=1,
        le=MOST_SAMPLES,
    )
    epochs: float | None = setting(
        40,
        "Length of the run in epochs. Ignored if `steps` is set.",
        resumable=True,
        gt=0,
        le=MOST_EPOCHS,
    )
    steps: int | None = setting(
        None,
        "Length of the run in optimizer steps. Null: `epochs` decides.",
        resumable=True,
        ge=1,
        le=MOST_STEPS,
    )
    ema: EmaConfig | None = setting(
        None, "Moving average of the weights. Null: none, the weights themselves are scored."
    )
    max_bad_steps: int = setting(
        3,
        "Stop after this many consecutive steps with a loss or gradient that is not finite.",
        numeric=False,
        ge=1,
        le=MOST_STEPS,
    )
    log_every: int = setting(10, "Steps between two log lines.", numeric=False, ge=1, le=MOST_STEPS)
    evaluate_every: int | None = setting(
        None,
        "Steps between two evaluations. The end of the run is always evaluated. "
        "Null: once per epoch.",
        resumable=True,
        ge=1,
        le=MOST_STEPS,
    )
    save_every: int | None = setting(
        None,
        "Steps between two checkpoints. The end of the run and a new best score are always saved. "
        "Null: with every evaluation.",
        numeric=False,
        ge=1,
        le=MOST_STEPS,
    )
    keep_last: int = setting(
        2,
        "Number of newest checkpoints to keep, in addition to the best.",
        numeric=False,
        ge=1,
        le=MOST_STEPS,
    )
    hang_minutes: float = setting(
        30.0,
        "End the job if a rank makes no progress for this many minutes, and say which one.",
        numeric=False,
        gt=0,
        le=100_000,
    )


class DdpEngine(Section):
    """PyTorch DistributedDataParallel."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: int = setting(25, "Size of a gradient bucket, in MB.", ge=1, le=1_000_000)


class DeepSpeedEngine(Section):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = setting(
        2,
        "What ZeRO partitions over the ranks. 0: nothing. 1: optimizer state. 2: gradients, too. "
        "3: parameters, too.",
    )
    bucket_mb: int = setting(25, "Size of a communication bucket, in MB.", ge=1, le=1_000_000)
    offload: bool = setting(
        False,
        "Stages 1 to 3: keep the optimizer's state in host memory and update the weights there.",
    )

    @model_validator(mode="after")
    def _offload_needs_a_partitioned_optimizer(self) -> DeepSpeedEngine:
        if self.offload and self.stage == 0:
            raise ValueError(
                "engine.offload needs engine.stage 1, 2 or 3, because stage 0 does not partition "
                "the optimizer's state"
            )
        return self


class NoTracking(Section):
    """No experiment tracker. The run directory has all metrics."""

    kind: Literal["none"] = "none"


class MlflowTracking(Section):
    """MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    uri: Address | None = setting(
        None,
        "Tracking server or sqlite:///file, without a password. Null: $MLFLOW_TRACKING_URI if it "
        "is set, else mlflow.db next to the run directory.",
    )
    experiment: str = setting(
        "coupalign", "Name of the MLflow experiment.", min_length=1, max_length=500
    )
    system_metrics: bool = setting(False, "Also record CPU, memory, disk and GPU usage.")


class EvalConfig(Section):
    """How a model is scored."""

    protocol: Literal["ris-v1", "lavt", "cris", "coupalign-author"] = setting(
        "ris-v1",
        "Resolution and threshold at which prediction and truth are compared; see docs/method.md.",
    )
    batch: int = setting(16, "Samples per rank and pass.", numeric=False, ge=1, le=65_536)
    pictures: int = setting(
        8,
        "Pictures of each kind (best, median, worst, random) to draw in the last evaluation.",
        numeric=False,
        ge=0,
        le=10_000,
    )
    bootstrap: int = setting(
        1000, "Resamples for the confidence intervals. 0: no intervals.", ge=0, le=MOST_SAMPLES
    )
    limit: int | None = setting(
        None,
        "Score only this many samples, for a quick look; never report such a score. Null: all.",
        ge=1,
        le=MOST_STEPS,
    )


class Config(Section):
    """The configuration of a run."""

    name: PlainName = setting(
        "coupalign", "Name of the run, and of its folder in runs/.", numeric=False
    )
    run_dir: Folder | None = setting(
        None, "Folder for everything the run writes. Null: runs/<name>.", numeric=False
    )
    seed: int = setting(
        0, "Seed of weights, data order, augmentation and dropout.", ge=0, le=2**32 - 1
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "Autocast type. The weights are always fp32."
    )
    compile: bool = setting(
        False,
        "Compile the parts of the model with torch.compile for training. The first start takes "
        "minutes; later ones read the cache. Cannot be combined with ZeRO 3.",
        numeric=False,
    )
    cuda_graphs: bool = setting(
        False,
        "Record the passes of a micro-batch as CUDA graphs and replay them, so that the host no "
        "longer launches every operator. Needs an NVIDIA GPU and engine.kind: ddp; cannot be "
        "combined with checkpointing.",
        numeric=False,
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = CoupAlignConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    engine: Annotated[Union[DdpEngine, DeepSpeedEngine], Field(discriminator="kind")] = setting(
        DdpEngine(), "How the ranks train together.", numeric=False
    )
    evaluate: EvalConfig = setting(EvalConfig(), "How the model is scored.", resumable=True)
    tracking: Annotated[Union[NoTracking, MlflowTracking], Field(discriminator="kind")] = setting(
        MlflowTracking(), "Where metrics are sent as well.", numeric=False
    )

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir or Path("runs") / self.name

    @model_validator(mode="before")
    @classmethod
    def _model_kind_defaults_to_coupalign(cls, tree: Any) -> Any:
        model = tree.get("model") if isinstance(tree, Mapping) else None
        if not isinstance(model, Mapping):
            return tree
        return {**tree, "model": {"kind": "coupalign", **model}}

    @model_validator(mode="after")
    def _no_zero3_when_compiling(self) -> Config:
        if self.compile and isinstance(self.engine, DeepSpeedEngine) and self.engine.stage == 3:
            raise ValueError(
                "compile: true cannot be combined with ZeRO 3, which partitions the weights. "
                "Set engine.stage to 2, or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _no_selective_checkpointing_when_compiling(self) -> Config:
        modes = (self.model.image.checkpointing, self.model.text.checkpointing)
        if self.compile and "selective" in modes:
            raise ValueError(
                "checkpointing: selective cannot be combined with compile: true, because the "
                "compiler makes its own choice of what to recompute. "
                "Set checkpointing to true or false, or set compile to false"
            )
        return self

    @model_validator(mode="after")
    def _cuda_graphs_need_ddp_without_checkpointing(self) -> Config:
        if not self.cuda_graphs:
            return self

        if isinstance(self.engine, DeepSpeedEngine):
            raise ValueError(
                "cuda_graphs cannot be combined with DeepSpeed, which moves the weights in "
                "memory. Set engine.kind to ddp, or cuda_graphs to false"
            )
        if self.model.image.checkpointing or self.model.text.checkpointing:
            raise ValueError(
                "cuda_graphs cannot record checkpointing, which reads the state of the random "
                "numbers. Set model.image.checkpointing and model.text.checkpointing to false, "
                "or cuda_graphs to false"
            )
        return self

    @model_validator(mode="after")
    def _run_length_is_set(self) -> Config:
        if self.train.steps is None and self.train.epochs is None:
            raise ValueError(
                "train.steps and train.epochs are both null. Set one: it says how long to train"
            )
        return self


# Keys of earlier versions that old files may still have, and what to do about each.
FORMER_KEYS = {
    "data.mix": "it is now called data.leaks: refuse (the default), exclude (was clean) "
    "or allow (was leaky)",
    "model.sma.sentence": "it was removed, the sentence is always the final [CLS] state; delete it",
}

# Values of earlier versions by (key, value), and their new names.
FORMER_VALUES = {
    ("data.leaks", "clean"): "exclude",
    ("data.leaks", "leaky"): "allow",
}
