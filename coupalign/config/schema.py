"""The whole configuration: every field, its unit and its default, in one file.

Variants are discriminated unions on `kind`, so that code `match`es on a type and go-to-definition works. Values are
frozen; unknown keys are refused by `config.load`, which names the file, the key and the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A frozen part of the configuration that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


# ---------------------------------------------------------------------------------------------------------- data


class Source(Section):
    """One split of one annotation set inside a packed shard directory."""

    index: str = Field(
        description="shard directory or its index.json: a local path, http(s):// or s3:// address"
    )
    dataset: str | None = Field(
        None, description="refcoco, refcoco+, refcocog, refshapes …; none: every set in the index"
    )
    split_by: str | None = Field(
        None, description="unc, google, umd …; none: every partition in the index"
    )
    split: str = Field(description="train, val, testA, testB, test …")


class Augmentation(Section):
    """Random changes of a training sample; each is off at 0."""

    flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a mirror image, with left and right swapped in the sentence",
    )
    color_jitter: float = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of brightness, contrast and saturation changes; "
        "none where the sentence names a color",
    )


class DataConfig(Section):
    train: tuple[Source, ...] = Field(
        (), description="mixture to train on; every sample once an epoch"
    )
    evaluate: tuple[Source, ...] = Field((), description="what is scored during and after training")
    image_size: int = Field(480, ge=32, description="side of the square model input, pixels")
    resize: Literal["squash", "letterbox"] = Field(
        "squash", description="squash ignores the aspect ratio; letterbox pads"
    )
    mix: Literal["clean", "leaky"] | None = Field(
        None,
        description="what is done with training samples on photographs that are to be scored: clean leaves them out, leaky keeps "
        "them, for comparison with papers, and marks every score; none refuses to train",
    )
    unit: Literal["ref", "sentence"] = Field(
        "ref", description="a training sample: a ref with one random sentence, or each sentence"
    )
    sentence: Literal["cleaned", "raw"] = Field(
        "cleaned", description="which text of the annotation is read: `sent` or `raw`"
    )
    tokenizer: str | None = Field(
        None,
        description="folder or hub name of a Hugging Face tokenizer; none: the vocabulary "
        "trained when the first training source was packed",
    )
    max_tokens: int = Field(
        20, ge=3, description="tokens a sentence is cut to, [CLS] and [SEP] included"
    )
    augment: Augmentation = Augmentation()
    shuffle_window: int = Field(
        256, ge=1, description="shards that are mixed with each other at a time"
    )
    canonical_nodes: int = Field(
        1,
        ge=1,
        description="equal parts into which each epoch's samples are divided, for a node to read one or "
        "several of: a multiple of the numbers of nodes that may ever be used; changing "
        "it changes the order",
    )
    workers: int = Field(
        2,
        ge=0,
        description="decoding processes per rank; the order of the data does not depend on it",
    )
    cache_dir: Path | None = Field(
        None, description="where remote shards are kept; none: the user's cache folder"
    )
    cache_gb: float = Field(100.0, gt=0, description="most that the cache may hold, GB (1e9 bytes)")
    bad_samples: Literal["fail", "skip"] = Field(
        "fail", description="what an unreadable sample does; skip counts and names it"
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="with skip: the share of samples above which the run stops"
    )


# --------------------------------------------------------------------------------------------------------- model


Checkpointing = Literal[False, True, "selective"]
_CHECKPOINTING = Field(
    False,
    description="recompute activations in backward: true, all of them; selective, those that are cheap, so not "
    "matrix products, convolutions and attention",
)


class TimmBackbone(Section):
    """A published image encoder, by its timm name."""

    kind: Literal["timm"] = "timm"
    name: str = Field(
        "swin_base_patch4_window12_384", description="timm name: swin_*, resnet101*, darknet53"
    )
    weights: str | None = Field(
        None,
        description="local file (official Swin .pth, timm, torchvision, Darknet), 'hub' for timm's own, "
        "a hub name, or none: random start",
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth of Swin, probability at the last block"
    )
    slope: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="of Darknet's rectifiers below zero: timm's weights 0.01, Darknet's own 0.1",
    )
    freeze_norm: bool = Field(
        True, description="keep BatchNorm statistics and scales as loaded (ResNet, Darknet)"
    )
    checkpointing: Checkpointing = _CHECKPOINTING


class SmallBackbone(Section):
    """A small four-stage encoder (strides 4, 8, 16, 32) for the CPU: residual 3x3 convolutions with GroupNorm."""

    kind: Literal["small"] = "small"
    widths: tuple[int, int, int, int] = Field(
        (32, 64, 96, 128), description="channels of the four stages"
    )
    depths: tuple[int, int, int, int] = Field((1, 1, 1, 1), description="blocks of the four stages")
    checkpointing: Checkpointing = _CHECKPOINTING


class BertText(Section):
    """A published BERT, by its Hugging Face files."""

    kind: Literal["bert"] = "bert"
    weights: str = Field(
        "bert-base-uncased",
        description="Hugging Face folder or hub name; random:FOLDER_OR_NAME takes only its shape",
    )
    dropout: float = Field(0.1, ge=0, lt=1)
    checkpointing: Checkpointing = _CHECKPOINTING


class SmallText(Section):
    """A BERT of the same code with a random start, sized by these fields; its vocabulary is the tokenizer's."""

    kind: Literal["small"] = "small"
    width: int = Field(128, ge=8)
    layers: int = Field(4, ge=4, description="cut into four groups, one an image stage")
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    checkpointing: Checkpointing = _CHECKPOINTING


class WpaConfig(Section):
    """Word-pixel alignment (METHOD: both directions from one score matrix)."""

    stages: tuple[bool, bool, bool, bool] = Field(
        (True, True, True, True), description="after which image stages it runs"
    )
    heads: int = Field(1, ge=1)
    impl: Literal["auto", "reference", "plain", "fused"] = Field(
        "auto",
        description="auto: fused kernels where they run, else reference (plain PyTorch); plain: projections kept, the oracle",
    )


class DecoderConfig(Section):
    width: int = Field(
        256, ge=8, description="d: channels of the pixel decoder and of the mask embeddings"
    )
    depth: int = Field(1, ge=1, description="3x3 convolutions a level")


class ProposalsConfig(Section):
    """The mask generator."""

    count: int = Field(
        100, ge=0, description="N mask embeddings; 0 is the model without sentence-mask alignment"
    )
    layers: int = Field(3, ge=1)
    heads: int = Field(8, ge=1)
    ffn: int = Field(2048, ge=8)
    dropout: float = Field(0.0, ge=0, lt=1)
    stages: tuple[int, ...] = Field(
        (4,), description="image stages whose aligned features the queries read"
    )


class SmaConfig(Section):
    sentence: Literal["cls", "mean"] = Field(
        "cls", description="L_g: the final [CLS] state, or the mean of the words"
    )
    scaled: bool = Field(
        False,
        description="divide Q . Y by sqrt(d) before the sigmoid, so that the mask signals do not start saturated",
    )


class MaskLossConfig(Section):
    """What a predicted mask is held to; the same words for every method."""

    mask: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    foreground: float = Field(
        1.1, gt=0, description="weight of foreground pixels in the cross-entropy"
    )
    background: float = Field(
        0.9, gt=0, description="weight of background pixels in the cross-entropy"
    )
    dice: float = Field(0.0, ge=0, description="weight of the Dice loss")
    boundary: float = Field(
        0.0, ge=0, description="weight of the boundary loss: 1 - F1 of the two boundaries"
    )


class LossConfig(MaskLossConfig):
    """CoupAlign's: with the auxiliary contrast of foreground and background pixels."""

    dice: float = Field(1.0, ge=0, description="weight of the Dice loss")
    contrast: float = Field(
        0.1, ge=0, description="weight of the auxiliary foreground/background contrast"
    )
    temperature: float = Field(0.1, gt=0, description="of the contrast")
    contrast_samples: int = Field(
        256, ge=1, description="pixels of each kind drawn per image for the contrast"
    )


class RefineConfig(Section):
    """Point-wise refinement: the least certain pixels of the full-size mask are decided again, each by itself."""

    points: int = Field(
        0, ge=0, description="pixels of an image that are decided again; 0: no refinement"
    )
    width: int = Field(64, ge=8, description="of the two hidden layers that decide a point")


class EncodersConfig(Section):
    """What every method has, so that methods are one line of a configuration apart."""

    image: Annotated[Union[TimmBackbone, SmallBackbone], Field(discriminator="kind")] = (
        TimmBackbone()
    )
    text: Annotated[Union[BertText, SmallText], Field(discriminator="kind")] = BertText()


class CoupAlignConfig(EncodersConfig):
    kind: Literal["coupalign"] = "coupalign"
    wpa: WpaConfig = WpaConfig()
    decoder: DecoderConfig = DecoderConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    sma: SmaConfig = SmaConfig()
    refine: RefineConfig = RefineConfig()
    losses: LossConfig = LossConfig()


class WideDecoderConfig(Section):
    """LAVT's decoder."""

    width: int = Field(512, ge=8, description="channels of the decoder")


class LavtConfig(EncodersConfig):
    """LAVT (CVPR 2022), our re-implementation; the Dice of its authors' later recipe is losses.dice=1."""

    kind: Literal["lavt"] = "lavt"
    decoder: WideDecoderConfig = WideDecoderConfig()
    losses: MaskLossConfig = MaskLossConfig()


class EvenMaskLossConfig(MaskLossConfig):
    """As published for VLT and LTS: every pixel counts alike."""

    foreground: float = Field(
        1.0, gt=0, description="weight of foreground pixels in the cross-entropy"
    )
    background: float = Field(
        1.0, gt=0, description="weight of background pixels in the cross-entropy"
    )


class VltTransformerConfig(Section):
    """VLT's queries and the transformer that answers them."""

    count: int = Field(16, ge=1, description="queries made of a sentence")
    width: int = Field(256, ge=8, description="channels of queries, pixels and mask decoder")
    encoder_layers: int = Field(2, ge=1)
    decoder_layers: int = Field(2, ge=1)
    heads: int = Field(8, ge=1)
    ffn: int = Field(1024, ge=8)
    dropout: float = Field(0.0, ge=0, lt=1)


class VltConfig(EncodersConfig):
    """VLT (ICCV 2021), our re-implementation; a rival of Table 2, with Darknet-53."""

    kind: Literal["vlt"] = "vlt"
    transformer: VltTransformerConfig = VltTransformerConfig()
    losses: EvenMaskLossConfig = EvenMaskLossConfig()


class LtsSegmentConfig(Section):
    """LTS's fused map and its segmentation network."""

    width: int = Field(
        256, ge=8, description="channels of the fused map and of the segmentation network"
    )
    dilations: tuple[PositiveInt, ...] = Field(
        (1, 3, 5), min_length=1, description="of the 3x3 convolutions side by side"
    )


class LtsLossConfig(EvenMaskLossConfig):
    locate: float = Field(
        1.0, ge=0, description="weight of the heat map's loss, which says where the object is"
    )


class LtsConfig(EncodersConfig):
    """LTS (CVPR 2021), our re-implementation; a rival of Table 2, with Darknet-53."""

    kind: Literal["lts"] = "lts"
    segment: LtsSegmentConfig = LtsSegmentConfig()
    losses: LtsLossConfig = LtsLossConfig()


ModelConfig = Annotated[
    Union[CoupAlignConfig, LavtConfig, VltConfig, LtsConfig], Field(discriminator="kind")
]


# ------------------------------------------------------------------------------------------------------ training


class OptimConfig(Section):
    """AdamW. No weight decay on norms, biases, position tables, queries and gates."""

    impl: Literal["torch", "apex"] = Field(
        "torch", description="apex is NVIDIA's FusedAdam, where it is installed"
    )
    lr_image: float = Field(5e-5, ge=0, description="peak learning rate of the image encoder")
    lr_text: float = Field(5e-5, ge=0, description="peak learning rate of the text encoder")
    lr_proposals: float | None = Field(
        None,
        ge=0,
        description="peak learning rate of CoupAlign's mask generator and sentence-mask "
        "alignment; none: that of everything else",
    )
    lr: float = Field(5e-5, ge=0, description="peak learning rate of everything else")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of an encoder's block over that of the block behind it; 1: "
        "the same for all",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the whole gradient; none: no clipping"
    )


class ScheduleConfig(Section):
    kind: Literal["poly", "cosine"] = "poly"
    power: float = Field(0.9, gt=0, description="of poly")
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0")
    final: float = Field(
        0.0, ge=0, le=1, description="share of the peak learning rate that is left at the end"
    )


class EmaConfig(Section):
    decay: float = Field(
        0.999,
        gt=0,
        lt=1,
        description="per step; the first steps use a shorter memory, (1 + step) / (10 + step)",
    )


class TrainConfig(Section):
    global_batch: int = Field(
        32, ge=1, description="samples per optimizer step over all ranks: the only batch dial"
    )
    max_micro_batch: int | None = Field(
        None, ge=1, description="most samples a rank takes at once; accumulation follows from it"
    )
    epochs: float | None = Field(40, gt=0, description="length of the run; or give `steps`")
    steps: int | None = Field(
        None, ge=1, description="length of the run in optimizer steps; wins over `epochs`"
    )
    ema: EmaConfig | None = None
    max_bad_steps: int = Field(
        3, ge=1, description="consecutive steps with a non-finite loss or gradient that end the run"
    )
    log_every: int = Field(10, ge=1, description="steps")
    evaluate_every: int | None = Field(
        None, ge=1, description="steps; none: once an epoch; always at the end"
    )
    save_every: int | None = Field(
        None, ge=1, description="steps; none: with every evaluation; always at the end"
    )
    keep_last: int = Field(
        2, ge=1, description="newest checkpoints that are kept, besides the best"
    )
    hang_minutes: float = Field(
        30.0,
        gt=0,
        description="without progress on a rank, after which it is named and the job ends",
    )


class DdpEngine(Section):
    kind: Literal["ddp"] = "ddp"
    bucket_mb: int = Field(25, ge=1)


class DeepSpeedEngine(Section):
    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="ZeRO: 0 nothing is partitioned, 1 optimizer state, 2 + gradients, 3 + parameters",
    )
    bucket_mb: int = Field(25, ge=1)
    offload: bool = Field(
        False,
        description="keep the optimizer's state in the memory of the host and update there; stages 1 to 3",
    )

    @model_validator(mode="after")
    def _something_to_offload(self) -> DeepSpeedEngine:
        if self.offload and self.stage == 0:
            raise ValueError(
                "engine.offload needs engine.stage 1, 2 or 3: stage 0 does not partition the optimizer's state"
            )
        return self


class NoTracking(Section):
    kind: Literal["none"] = "none"


class MlflowTracking(Section):
    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        None,
        description="tracking server or sqlite:///file; none: MLFLOW_TRACKING_URI, else runs/mlflow.db "
        "beside the run directory",
    )
    experiment: str = "coupalign"
    system_metrics: bool = False


class EvalConfig(Section):
    protocol: Literal["ris-v1", "lavt", "cris"] = Field(
        "ris-v1", description="how a prediction meets the truth; docs/method.md"
    )
    batch: int = Field(16, ge=1, description="samples a rank takes at once")
    pictures: int = Field(
        8,
        ge=0,
        description="samples of each kind (best, median, worst, random) that the last evaluation of a "
        "training draws",
    )
    bootstrap: int = Field(1000, ge=0, description="resamples of the confidence intervals; 0: none")
    limit: int | None = Field(
        None, ge=1, description="score only so many samples: a quick look, never a result"
    )


class Config(Section):
    name: str = Field(
        "coupalign", pattern=r"^[\w.+-]+$", description="of the run; also its folder below runs/"
    )
    run_dir: Path | None = Field(
        None, description="where everything of the run lies; none: runs/<name>"
    )
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="autocast type; the weights stay fp32"
    )
    compile: bool = Field(
        False,
        description="torch.compile the parts of the model one by one, for training; the first start takes "
        "minutes, later ones read the cache. Not with ZeRO 3, whose weights are never whole",
    )
    cuda_graphs: bool = Field(
        False,
        description="record the passes of a micro-batch once and play them back, so that the host no longer "
        "launches every operator; an NVIDIA GPU and engine.kind: ddp, without checkpointing",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = CoupAlignConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    engine: Annotated[Union[DdpEngine, DeepSpeedEngine], Field(discriminator="kind")] = DdpEngine()
    evaluate: EvalConfig = EvalConfig()
    tracking: Annotated[Union[NoTracking, MlflowTracking], Field(discriminator="kind")] = (
        MlflowTracking()
    )

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir or Path("runs") / self.name

    @model_validator(mode="before")
    @classmethod
    def _coupalign_by_default(cls, tree: Any) -> Any:
        model = tree.get("model") if isinstance(tree, Mapping) else None
        return (
            {**tree, "model": {"kind": "coupalign", **model}}
            if isinstance(model, Mapping)
            else tree
        )

    @model_validator(mode="after")
    def _whole_weights_to_compile(self) -> Config:
        if self.compile and isinstance(self.engine, DeepSpeedEngine) and self.engine.stage == 3:
            raise ValueError(
                "compile needs whole weights, which ZeRO 3 never has: set engine.stage to 2, or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _one_who_chooses(self) -> Config:
        if self.compile and "selective" in (
            self.model.image.checkpointing,
            self.model.text.checkpointing,
        ):
            raise ValueError(
                "checkpointing: selective is for models that are not compiled; the compiler chooses by itself what to "
                "recompute: set it to true or false, or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _passes_that_can_be_recorded(self) -> Config:
        if self.cuda_graphs and isinstance(self.engine, DeepSpeedEngine):
            raise ValueError(
                "cuda_graphs needs weights that stay where they are, and DeepSpeed moves them: set engine.kind to ddp, or "
                "cuda_graphs to false"
            )
        if self.cuda_graphs and (self.model.image.checkpointing or self.model.text.checkpointing):
            raise ValueError(
                "cuda_graphs cannot record checkpointing, which asks for the state of the random numbers: set "
                "model.image.checkpointing and model.text.checkpointing to false, or cuda_graphs to false"
            )
        return self

    @model_validator(mode="after")
    def _some_length(self) -> Config:
        if self.train.steps is None and self.train.epochs is None:
            raise ValueError("train.steps and train.epochs are both empty: say how long to train")
        return self
