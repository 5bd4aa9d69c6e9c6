"""The file of an ablation: arms that differ in some settings, what is measured, and what is claimed.

A file names one `base:` beside it, which holds what all ablations share: sizes with their data and the runs that every
arm starts from. Keys of the file replace those of the base.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megavl.config.bounds import NonNegativeReal, PathText, Positive, Real, Seed
from megavl.config.errors import UsageError, one_line
from megavl.foreign.yaml_text import read_yaml

STRICT = ConfigDict(extra="forbid")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=60)]
"""Name of an arm, stage, data set or measure; part of file names and keys."""
NonEmpty = Annotated[tuple[Name, ...], Field(min_length=1)]
Title = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^_\s][^\r\n]*$", max_length=200)]
"""One line of at most 200 characters; a legend leaves out what begins with an underscore."""
Settings = dict[str, Any]
"""Values of a recipe by dotted path."""
ALL = "all"
"""The name under which settings go to each stage of an arm."""
_SHOWN = 200


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dataset:
    """A folder of shards: made from a corpus, or one that is there already."""

    path: PathText | None = None
    inputs: tuple[str, ...] = ()
    """Files as CORPUS/FILE."""
    options: tuple[str, ...] = ()
    """Further options of data_tools/preprocess.py."""

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.inputs):
            raise UsageError("a data set has either `path` or `inputs`")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stage:
    """One run of `megavl train`."""

    recipe: Name
    """File without .yaml in the recipes of the size."""
    set: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ancestor:
    """Weights that arms start from: a checkpoint that is there already, or a run from random weights."""

    path: PathText | None = None
    recipe: Name | None = None
    set: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.recipe is None):
            raise UsageError("an ancestor has either `path` or `recipe`")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Size:
    """How large everything is."""

    like: Name | None = None
    """Size whose keys hold where this one has none."""
    recipes: PathText = "launch/recipes/tiny"
    """Folder of the recipes."""
    launcher: Literal["1b", "7b"] | None = None
    """Start runs by `launch/{warmup,pretrain,sft}_SIZE.sh`; default: as one process each."""
    corpora: dict[Name, tuple[str, ...]] = field(default_factory=dict)
    """Options of `data_tools/build_corpus.py demo`."""
    tokenizer: str
    """Path, or `corpus:NAME/tokenizer`."""
    seq_length: Positive | None = None
    """Tokens of a sequence, of all data sets and runs; default: the recipes'."""
    datasets: dict[Name, Dataset] = field(default_factory=dict)
    ancestors: dict[Name, Ancestor]
    set: Settings = field(default_factory=dict)
    """Settings of every run."""
    stages: dict[Name, Settings] = field(default_factory=dict)
    """Settings of the stages of this name."""
    seeds: Positive | None = None
    """Default: the ablation's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Start:
    """Weights of an arm's first stage. What no ancestor gives is drawn from the seed: the adaptor above all."""

    llm: Name
    siglip: Name
    sam: Name | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Arm:
    """One of the things compared: a chain of stages, each starting from the one before."""

    title: Title
    chain: NonEmpty | None = None
    """Its stages in order; default: the ablation's."""
    start: Start | None = None
    """Default: the ablation's."""
    set: Settings = field(default_factory=dict)
    """Settings as STAGE.key.path, or all.key.path for all of them."""
    by_size: dict[Name, Settings] = field(default_factory=dict)
    """Such settings at one size."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Measure:
    """One number of a run."""

    title: Title
    source: Literal["evaluation", "training"]
    """The last row of evaluation.jsonl, or the mean of the last tenth of metrics.jsonl."""
    key: str
    """Dotted path in such a row."""
    better: Literal["higher", "lower"]
    modality: Literal["text", "multimodal"] | None = None
    """Of the rows of metrics.jsonl; default: both."""
    reduce: Literal["last", "worst"] = "last"
    """Which value of a run's curve counts."""
    chance: Real | None = None
    """Value of a model that knows nothing; default: the first of the run."""
    limit: Real | None = None
    """The best value that there can be."""

    def __post_init__(self) -> None:
        if self.modality is not None and self.source == "evaluation":
            raise UsageError("`modality` is of the rows of training; name it in the key, or remove it")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Claim:
    """That one arm is better than another, or no worse, in one measure."""

    text: Title
    measure: Name
    kind: Literal["better", "no_worse"] = "better"
    arm: Name
    than: Name
    margin: NonNegativeReal
    """Smallest difference that matters, in the unit of the measure."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Speed:
    """That the steps of one arm's last stage are faster than another's."""

    text: Title
    arm: Name
    than: Name
    margin: NonNegativeReal
    """Smallest gain that matters; 0.05 stands for 5% more steps in the same time."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Simulation:
    """What the planner says of a run at the paper's scale."""

    title: Title
    recipe: PathText
    set: Settings = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Of `megavl plan`."""
    key: str
    """Dotted path in its JSON."""
    unit: Literal["share", "number"] = "share"
    """A share is shown as a percentage."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Figure:
    """The picture: a panel for each measure, with curves over steps or one point for each arm."""

    kind: Literal["curves", "points"]
    measures: NonEmpty


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ablation:
    """A file with its base."""

    title: Title
    paper: str
    """What the paper shows and says."""
    confounded: str = ""
    """What else differs between arms."""
    sizes: dict[Name, Size]
    start: Start
    stages: dict[Name, Stage]
    chain: NonEmpty
    """Stages of an arm, in order."""
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    seeds: Positive
    first_seed: Seed = 1
    measures: dict[Name, Measure]
    claims: tuple[Claim, ...]
    speeds: tuple[Speed, ...] = ()
    figure: Figure
    simulations: tuple[Simulation, ...] = ()

    def __post_init__(self) -> None:
        for number, claim in enumerate(self.claims):
            _known(f"claims.{number}.measure", claim.measure, self.measures)
            _known(f"claims.{number}.arm", claim.arm, self.arms)
            _known(f"claims.{number}.than", claim.than, self.arms)
            if claim.arm == claim.than:
                raise UsageError(f"claims.{number}.than: is the arm itself, {claim.arm!r}; name another arm")
        for number, speed in enumerate(self.speeds):
            _known(f"speeds.{number}.arm", speed.arm, self.arms)
            _known(f"speeds.{number}.than", speed.than, self.arms)
            if speed.arm == speed.than:
                raise UsageError(f"speeds.{number}.than: is the arm itself, {speed.arm!r}; name another arm")
        for number, measure in enumerate(self.figure.measures):
            _known(f"figure.measures.{number}", measure, self.measures)
        for number, one in enumerate(self.simulations):
            if one.title in [other.title for other in self.simulations[:number]]:
                raise UsageError(
                    f"simulations.{number}.title: {one.title!r} stands there twice; results are named by it"
                )
        for stage in self.chain:
            _known("chain", stage, self.stages)
        for name, arm in self.arms.items():
            self._check_arm(f"arms.{name}", arm)
        for name, size in self.sizes.items():
            self._check_size(name, size)

    def _check_arm(self, path: str, arm: Arm) -> None:
        chain = arm.chain or self.chain
        for stage in chain:
            _known(f"{path}.chain", stage, self.stages)
        for size in arm.by_size:
            _known(f"{path}.by_size", size, self.sizes)
        places = {"set": arm.set, **{f"by_size.{size}": values for size, values in arm.by_size.items()}}
        for where, settings in places.items():
            for key in settings:
                stage, _, rest = key.partition(".")
                # A setting that no run of the arm reads would be lost without a word.
                _known(f"{path}.{where}.{key}", stage, [*chain, ALL])
                if not rest:
                    raise UsageError(f"{path}.{where}.{key}: names a stage alone; write STAGE.key.path")

    def _check_size(self, name: str, size: Size) -> None:
        for stage in size.stages:
            _known(f"sizes.{name}.stages", stage, self.stages)
        for path, start in [
            ("start", self.start),
            *((f"arms.{arm}.start", one.start) for arm, one in self.arms.items()),
        ]:
            for part in () if start is None else filter(None, (start.llm, start.siglip, start.sam)):
                _known(f"{path}, at size {name}", part, size.ancestors)
        for dataset, made in size.datasets.items():
            if made.inputs and size.seq_length is None:
                raise UsageError(f"sizes.{name}.seq_length: is needed to make the data set {dataset}; add it")
            for file in made.inputs:
                _known(f"sizes.{name}.datasets.{dataset}.inputs", file.partition("/")[0], size.corpora)


def read_ablation(path: Path) -> Ablation:
    """Read and check a file.

    Raises:
        UsageError: names the file, the key, the value and the remedy.
    """
    raw = _read(path)
    base = raw.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UsageError(f"{path}: base: found {base!r}; give the name of a file beside this one")
        raw = _merged(_read(path.parent / base), raw)
    sizes = raw.get("sizes")
    if isinstance(sizes, Mapping):
        raw["sizes"] = {name: _like(name, sizes, path=path) for name in sizes}
    try:
        return TypeAdapter(Ablation).validate_python(raw)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first(error)}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{path}: cannot read the ablation ({reason}); give the path of a YAML file") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: an ablation is a mapping of keys to values; see launch/ablations/README.md")
    _require_plain(raw, at=f"{path}: ")
    return raw


def _require_plain(value: Any, *, at: str) -> None:
    """Refuse what YAML can say and JSON cannot: dates, bytes, sets, and keys that are no text."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{at}key {key!r} is a {type(key).__name__}; keys are text, quote it")
            _require_plain(one, at=f"{at}{key}.")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            _require_plain(one, at=f"{at}{number}.")
    elif not isinstance(value, str | int | float | None):
        raise UsageError(
            f"{at[:-1]}: found {value!r:.{_SHOWN}}; write a number, a list or a mapping, or quote the text"
        )


def _merged(under: Any, over: Any) -> Any:
    """`over` on top of `under`: mappings key by key, everything else whole."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}


def _like(name: str, sizes: Mapping[str, Any], *, path: Path) -> Any:
    size = sizes[name]
    like = size.get("like") if isinstance(size, Mapping) else None
    if like is None:
        return size
    other = sizes.get(like) if isinstance(like, str) else None
    if not isinstance(other, Mapping) or "like" in other:
        raise UsageError(f"{path}: sizes.{name}.like: found {like!r}; name a size that has no `like` itself")
    return _merged(other, size)


def _known(path: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        raise UsageError(f"{path}: there is no {name!r}; {hint}")


def _first(error: ValidationError) -> str:
    found = sorted(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")[0]
    path = ".".join(str(part) for part in found["loc"] if not str(part).endswith("]"))
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return f"{path}: {cause}" if path else str(cause)
    if found["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key; remove it or correct its name"
    if found["type"].startswith("missing"):
        return f"{path}: this key is required; add it"
    return f"{path}: found {repr(found['input'])[:_SHOWN]}; {found['msg']}"
