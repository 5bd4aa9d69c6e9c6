"""The recipe of one training stage, with the checks that concern several of its fields."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megavl.config.bounds import (
    Decay,
    Fraction,
    NonNegative,
    NonNegativeReal,
    PathText,
    Positive,
    PositiveReal,
    Seed,
    Threads,
)
from megavl.config.data import DataConfig, check_sources
from megavl.config.errors import UsageError
from megavl.config.evaluation import EvaluationConfig, check_evaluation
from megavl.config.model import STRICT, ModelConfig
from megavl.config.run import RunConfig

Compile = Literal["auto", "none", "kernels", "layers"]
"""How far `training.compile` goes."""

TRAINABLE_PARTS = ("llm", "adaptor", "sam_downsamples", "sam_hd", "sam_neck", "sam_trunk", "siglip")
"""Groups of parameters that can train; `megavl/model/trainable.py` lists what each covers."""

TRAINABLE_BY_STAGE: dict[int, tuple[str, ...]] = {
    1: ("adaptor", "sam_downsamples", "sam_hd"),
    2: ("llm", "adaptor", "sam_downsamples", "sam_hd"),
    3: ("llm", "adaptor", "sam_downsamples", "sam_hd", "siglip"),
}
"""Paper, section 3.2: the downsamples count as adaptor. The HD branch must train: it has no pretrained weights."""

ENCODED_AT_ONCE = 16
"""Images of a rank's share that run through the vision towers together under `parallel.vision: split_all`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the model is split over ranks; data-parallel ranks = world size / (tensor x pipeline)."""

    tensor: Positive = 1
    """Tensor-parallel ranks."""
    pipeline: Positive = 1
    """Pipeline ranks."""
    virtual_pipeline: Positive = 1
    """Stages per pipeline rank; a value above 1 selects the interleaved schedule and needs pipeline > 1."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence; needs tensor > 1."""
    layout: Literal["auto"] | tuple[NonNegative, ...] = "auto"
    """Decoder layers of each pipeline stage; stage i runs on pipeline rank i % pipeline. With `auto`, the planner
    balances the stages and counts the vision encoders too."""
    vision: Literal["recompute", "split_tp", "split_all"] = "recompute"
    """Which ranks run the vision encoders. `recompute`: every tensor-parallel rank of the first stage encodes all
    images (paper, section 3.3). `split_tp`: these ranks split the images of a micro-batch. `split_all`: all tensor x
    pipeline ranks split the images of the step and encode them before the pipeline starts, `ENCODED_AT_ONCE` at a
    time."""
    distributed_optimizer: bool = True
    """Split the optimizer's state and update over data-parallel ranks; if false, each rank holds and updates all of it.
    Checkpoints are the same."""
    overlap_grad_reduce: bool = True
    """Reduce gradients bucket by bucket during the backward pass; one data-parallel rank has nothing to reduce."""
    overlap_param_gather: bool = True
    """Gather updated weights during the next forward pass; needs distributed_optimizer and overlap_grad_reduce."""
    bucket_size: Positive | None = None
    """Parameters per gradient bucket. Default: megatron-core's rule, 40 million, or one million for each data-parallel
    rank if that is more."""
    deterministic: bool = False
    """Make runs on CUDA bitwise reproducible, as they always are on a CPU. Some algorithms are slower, and an operation
    without a deterministic algorithm ends the run."""
    cpu_binding: Literal["auto", "none"] = "auto"
    """`auto`: a rank with a GPU stays on the cores of the GPU's NUMA node, unless its launcher has bound it."""
    timeout_s: Positive = 600
    """Seconds without progress, such as in a collective that waits for a missing rank, after which a run ends with
    code 7."""

    def bucket(self, *, ranks: int) -> int:
        """Parameters per gradient bucket of `ranks` data-parallel ranks."""
        return self.bucket_size or max(40_000_000, 1_000_000 * ranks)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecomputeConfig:
    """Recomputation of activations in the backward pass."""

    granularity: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes `modules`; `full` recomputes whole layers, `num_layers` at a time."""
    modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Parts that `selective` recomputes. megatron-core's `layernorm` needs Transformer Engine and is not offered."""
    num_layers: Positive = 1
    """Layers per recomputed block under `full`."""
    vision: bool = False
    """Recompute every block of a trained vision encoder in the backward pass."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Defaults: paper, Table 5."""

    lr: PositiveReal
    """Peak learning rate."""
    min_lr: NonNegativeReal = 0.0
    """Learning rate at the end of `cosine`; the paper does not state it."""
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    """`multistep` drops to 31.6% at 80% and to 10% at 90% of the steps (DeepSeek-LLM, arXiv 2401.02954)."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from zero."""
    milestones: tuple[Fraction, ...] = (0.8, 0.9)
    """Fractions of training.steps at which `multistep` drops."""
    factors: tuple[Fraction, ...] = (0.316, 0.1)
    """Learning rate after each milestone, as a fraction of the peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the two moment estimates."""
    eps: PositiveReal = 1e-8
    """Added to the denominator of the update; the paper does not state it, so this is torch's default."""
    weight_decay: NonNegativeReal = 0.0
    """Applied to matrices only, never to biases and norms."""
    clip_grad: NonNegativeReal = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    state_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of both moments. `bf16` halves the optimizer's state: of fp32 weights only the 16 bits are kept that the
    bf16 weights lack. It needs Transformer Engine, training.precision bf16 and parallel.distributed_optimizer. The host
    then waits for the gradient norm of each step. Checkpoints hold fp32 in any case."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """Length, batch sizes and precision of the stage."""

    stage: Literal[1, 2, 3]
    """DeepSeek-VL stage: 1 adaptor, 2 adaptor + language model, 3 adaptor + language model + SigLIP."""
    train: tuple[str, ...] | None = None
    """Groups of parameters that train. Default: the stage's row of TRAINABLE_BY_STAGE."""
    steps: Positive
    """Optimizer steps."""
    global_batch_size: Positive
    """Sequences per step."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass of one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` keeps fp32 master weights and accumulates gradients in fp32."""
    transformer_engine: Literal["auto", "always", "never"] = "auto"
    """Build decoder layers from Transformer Engine's modules, with cuDNN's attention and a fused rotary embedding.
    `auto`: on CUDA in bf16 where it is installed; `always`: else the run ends with code 2. Checkpoints are the same."""
    seed: Seed = 1234
    """Seed of weights, data order and modality plan."""
    max_bad_steps: Positive = 3
    """Steps in a row with a loss or gradient that is not finite before the run ends with code 6."""
    compile: Compile = "auto"
    """What torch.compile makes faster. `kernels`: norms, SwiGLU, rotary embedding and loss, each as one kernel.
    `layers`: besides, each decoder layer on one tensor-parallel rank as two steps around its attention, and frozen
    blocks of the vision encoders. `none`: nothing. `auto`: `layers` on CUDA, `none` on a CPU, where the compiler takes
    a minute of the first start. Losses differ by rounding. Where torch.compile fails, a warning says so and the run
    goes on without it."""
    threads: Threads | None = None
    """CPU threads per rank. Default: cores / local ranks."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Where a run saves, and what it starts from."""

    dir: PathText | None = None
    """Directory of checkpoints. Default: `checkpoints` in run.dir. A run resumes from the newest valid one in it."""
    interval: Positive = 500
    """Steps between two saves; the last step always saves."""
    keep: Annotated[Positive, Field(ge=2)] = 2
    """Number of newest checkpoints to keep."""
    async_save: bool = False
    """Train on while a save is written; each rank keeps a copy of its part in host memory. Off by default: a run that
    is killed before the write has ended resumes from the checkpoint before. The last save always waits."""
    init: PathText | None = None
    """MegaVL checkpoint, or the directory that holds it, from which a new run takes its weights, but no optimizer
    state. Model and tokenizer must be the checkpoint's; `model: {from: init}` takes all sizes from it."""
    allow_random_init: bool = False
    """Allow a new run without init to start from random weights; off by default, so that this is never an accident."""
    allow_fresh: bool = False
    """Start from step 0 even if checkpoint.dir holds only damaged checkpoints."""
    force_resume: bool = False
    """Resume even if seed, global batch size, data, tokenizer or stage differ from the checkpoint's; each is logged. Of
    another batch size, samples go on where they stopped."""
    skip_hash: bool = False
    """Check only the sizes of a checkpoint's files when it is opened, not their hashes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One stage of training."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check_parallel(self)
        _check_batch(self)
        check_evaluation(self.evaluation)
        if self.training.train == ():
            raise UsageError(f"training.train: names nothing; choose from {', '.join(TRAINABLE_PARTS)}")
        for part in self.training.train or ():
            if part not in TRAINABLE_PARTS:
                raise UsageError(f"training.train: unknown part {part!r}; choose from {', '.join(TRAINABLE_PARTS)}")
        if len(self.optimizer.milestones) != len(self.optimizer.factors):
            raise UsageError(
                f"optimizer.factors: {len(self.optimizer.factors)} factors for "
                f"{len(self.optimizer.milestones)} optimizer.milestones; give one factor per milestone"
            )
        if self.optimizer.warmup_steps > self.training.steps:
            raise UsageError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} exceeds training.steps "
                f"{self.training.steps}; set optimizer.warmup_steps to {self.training.steps} or less, or raise "
                "training.steps"
            )
        rate, low = self.optimizer.lr, self.optimizer.min_lr
        if self.optimizer.schedule == "cosine" and low > rate:
            raise UsageError(f"optimizer.min_lr: {low} is above optimizer.lr {rate}; set it to {rate} or less")
        snapshot = () if self.run.memory_snapshot_step is None else (self.run.memory_snapshot_step,)
        recorded = {
            "run.timeline_steps": self.run.timeline_steps,
            "run.profile_steps": self.run.profile_steps,
            "run.memory_snapshot_step": snapshot,
        }
        for name, steps in recorded.items():
            if late := [step for step in steps if step > self.training.steps]:
                raise UsageError(
                    f"{name}: {late[0]} exceeds training.steps {self.training.steps}; name earlier steps or "
                    "train longer"
                )

    @property
    def checkpoint_dir(self) -> str:
        """Directory of this run's checkpoints."""
        return self.checkpoint.dir or f"{self.run.dir}/checkpoints"

    @property
    def trainable_parts(self) -> tuple[str, ...]:
        """Groups of parameters that this run trains."""
        return TRAINABLE_BY_STAGE[self.training.stage] if self.training.train is None else self.training.train

    @property
    def stages(self) -> int:
        """Number of pipeline stages, virtual ones included."""
        return self.parallel.pipeline * self.parallel.virtual_pipeline

    def data_parallel(self, world_size: int) -> int:
        """Number of data-parallel ranks among `world_size` processes; checks all fields that depend on it."""
        model_ranks = self.parallel.tensor * self.parallel.pipeline
        if world_size % model_ranks:
            raise UsageError(
                f"parallel: {world_size} processes are no multiple of parallel.tensor {self.parallel.tensor} x "
                f"parallel.pipeline {self.parallel.pipeline} = {model_ranks}; start a multiple of {model_ranks}"
            )
        ranks = world_size // model_ranks
        window = ranks * self.training.micro_batch_size
        if self.training.global_batch_size % window:
            raise UsageError(
                f"training.global_batch_size: {self.training.global_batch_size} is no multiple of "
                f"data-parallel ranks {ranks} x training.micro_batch_size {self.training.micro_batch_size} = {window}"
            )
        batches, pipeline = self.training.global_batch_size // window, self.parallel.pipeline
        if self.parallel.virtual_pipeline > 1 and batches % pipeline:
            raise UsageError(
                f"parallel.virtual_pipeline: {batches} micro-batches a step are no multiple of parallel.pipeline "
                f"{pipeline}, which the interleaved schedule needs; use training.global_batch_size "
                f"{-(-batches // pipeline) * pipeline * window} or parallel.virtual_pipeline 1"
            )
        return ranks


def _check_parallel(recipe: Recipe) -> None:
    parallel, llm = recipe.parallel, recipe.model.llm
    for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(llm, name)
        if value % parallel.tensor:
            raise UsageError(
                f"parallel.tensor: {parallel.tensor} does not divide model.llm.{name} {value}; choose a divisor"
            )
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise UsageError("parallel.sequence_parallel: true needs parallel.tensor > 1, which is 1; switch it off")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise UsageError(
            "parallel.overlap_param_gather: true needs parallel.overlap_grad_reduce, which is false; set both or none"
        )
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        raise UsageError(
            "parallel.overlap_param_gather: true needs parallel.distributed_optimizer, which is false: every rank "
            "updates all weights, and nothing is gathered; set both or none"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UsageError(
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} needs parallel.pipeline > 1, which is 1; use 1"
        )
    ranks = {"recompute": 2, "split_tp": parallel.tensor, "split_all": parallel.tensor * parallel.pipeline}
    if ranks[parallel.vision] == 1:
        needed = "parallel.tensor" if parallel.vision == "split_tp" else "parallel.tensor x parallel.pipeline"
        raise UsageError(
            f"parallel.vision: {parallel.vision} splits images over {needed} ranks, which is 1; use recompute"
        )
    if parallel.layout != "auto":
        if len(parallel.layout) != recipe.stages:
            raise UsageError(
                f"parallel.layout: {list(parallel.layout)} names {len(parallel.layout)} stages, but "
                f"parallel.pipeline {parallel.pipeline} x parallel.virtual_pipeline {parallel.virtual_pipeline} is "
                f"{recipe.stages}; give one entry per stage"
            )
        if sum(parallel.layout) != llm.num_layers:
            raise UsageError(
                f"parallel.layout: {list(parallel.layout)} adds up to {sum(parallel.layout)} layers, but "
                f"model.llm.num_layers is {llm.num_layers}"
            )
    if recipe.optimizer.state_precision == "bf16":
        if recipe.training.precision != "bf16":
            raise UsageError(
                f"optimizer.state_precision: bf16 needs training.precision bf16, which is {recipe.training.precision}; "
                "use fp32"
            )
        if not parallel.distributed_optimizer:
            raise UsageError(
                "optimizer.state_precision: bf16 needs parallel.distributed_optimizer, which is false; set that to "
                "true, or use fp32"
            )
    if recipe.recompute.granularity == "full" and recipe.recompute.num_layers > llm.num_layers:
        raise UsageError(
            f"recompute.num_layers: {recipe.recompute.num_layers} exceeds model.llm.num_layers {llm.num_layers}"
        )


def _check_batch(recipe: Recipe) -> None:
    training, data = recipe.training, recipe.data
    tokens = training.micro_batch_size * data.seq_length
    if recipe.parallel.sequence_parallel and tokens % recipe.parallel.tensor:
        raise UsageError(
            f"data.seq_length: {training.micro_batch_size} x {data.seq_length} tokens of a micro-batch are no "
            f"multiple of parallel.tensor {recipe.parallel.tensor}, which parallel.sequence_parallel needs"
        )
    if recipe.parallel.sequence_parallel and recipe.evaluation.held_out and data.seq_length % recipe.parallel.tensor:
        raise UsageError(
            f"data.seq_length: {data.seq_length} tokens of a sequence are no multiple of parallel.tensor "
            f"{recipe.parallel.tensor}, which evaluation.held_out needs under parallel.sequence_parallel"
        )
    if data.multimodal_fraction > 0 and recipe.model.image_tokens >= data.seq_length:
        raise UsageError(
            f"data.seq_length: {data.seq_length} tokens cannot hold one image of {recipe.model.image_tokens} tokens"
        )
    check_sources(data)
