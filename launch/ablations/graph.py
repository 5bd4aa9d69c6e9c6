"""Everything that an ablation computes, as a graph of tasks.

A task is addressed by a hash of what determines its result: the resolved recipe, or the options of a command. The
addresses of its inputs stand there in place of paths, and what is read from outside counts by its content. Two
ablations that ask for the same task share it. The commit of the code is not part of the address; reports name it.

In the words of a task, `{ADDRESS}` stands for the folder of a task, and `{self}` for its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.ablations.definition import ALL, Ablation, Ancestor, Arm, Dataset, Settings, Size, Start
from launch.ablations.outside import contents, paths_of
from megavl.config.errors import UsageError
from megavl.config.evaluation import evaluated_names
from megavl.config.load import load_recipe, to_dict
from megavl.config.recipe import Recipe

FORMAT = 1
"""Changed when equal words come to mean something else."""
Kind = Literal["corpus", "dataset", "start", "train"]
_REFERENCE = re.compile(r"^(corpus|dataset):([^/]+)(?:/(.*))?$")
_FOLDER = re.compile(r"\{([a-z]+-[0-9a-f]{16}|self)\}")
SEED = "training.seed"
_Placed = dict[str, tuple[str, Any]]
"""Settings by key in the order in which they count: where each stands in the file, and its value."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One program to run, in a folder of its own."""

    kind: Kind
    name: str
    """For people."""
    spec: Mapping[str, Any]
    """What determines the result, as JSON."""
    inputs: tuple[Task, ...] = ()
    recipe: Recipe | None = None
    """Of a `train` task, with `{ADDRESS}` in its paths."""

    @cached_property
    def address(self) -> str:
        """Name of its folder."""
        text = json.dumps({"format": FORMAT, "kind": self.kind, **self.spec}, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.recipe.training.steps if self.recipe else 0

    def with_inputs(self) -> list[Task]:
        """Everything that it needs, and itself at the end."""
        found: dict[str, Task] = {}
        for one in (*(needed for task in self.inputs for needed in task.with_inputs()), self):
            found.setdefault(one.address, one)
        return list(found.values())

    @cached_property
    def level(self) -> int:
        """0 without inputs, else one more than the highest input's."""
        return 1 + max((task.level for task in self.inputs), default=-1)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The runs of one arm with one seed, in order."""

    arm: str
    seed: int
    runs: tuple[Task, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The cells of an ablation at one size, and all tasks that they need."""

    cells: tuple[Cell, ...]

    @property
    def tasks(self) -> list[Task]:
        """Each task once, after its inputs; tasks of one level stand together."""
        found = {task.address: task for cell in self.cells for run in cell.runs for task in run.with_inputs()}
        return sorted(found.values(), key=lambda task: task.level)


def build_graph(ablation: Ablation, *, size: str, seeds: int | None = None) -> Graph:
    """Every cell of an ablation.

    Args:
        size: one of `ablation.sizes`.
        seeds: how many; default: the size's or the ablation's.

    Raises:
        UsageError: an unknown size, a recipe that its settings make wrong, two arms that are the same runs, or a
            measure that the last run of an arm does not log.
        DataError: data outside the cache are there and cannot be read.
    """
    if size not in ablation.sizes:
        raise UsageError(f"--size {size}: the ablation has the sizes {', '.join(ablation.sizes)}")
    builder = _Builder(ablation, size)
    count = seeds or ablation.sizes[size].seeds or ablation.seeds
    numbers = range(ablation.first_seed, ablation.first_seed + count)
    # Arms with one seed stand together: whatever slows the machine for a while slows them all, so it tells on no claim.
    cells = tuple(builder.cell(arm, seed) for seed in numbers for arm in ablation.arms)
    _require_different(cells, size=size)
    _require_measured(cells, ablation=ablation)
    return Graph(cells=cells)


def _require_different(cells: Sequence[Cell], *, size: str) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        other = seen.setdefault(cell.runs[-1].address, cell.arm)
        if other != cell.arm:
            raise UsageError(
                f"arms.{cell.arm}: is the same as {other} at size {size}; give it other settings there, or remove it"
            )


def _require_measured(cells: Sequence[Cell], *, ablation: Ablation) -> None:
    """Runs take hours, and then it is late to hear that they have measured something else."""
    for name, measure in ablation.measures.items():
        part, _, rest = measure.key.partition(".")
        for cell in cells if measure.source == "evaluation" else ():
            recipe = cell.runs[-1].recipe
            assert recipe is not None, "the last run trains"
            where = f"measures.{name}: {measure.key}: the last stage of arm {cell.arm}"
            if recipe.evaluation.interval == 0:
                raise UsageError(f"{where} is not evaluated; set its evaluation.interval in stages or arms")
            known = evaluated_names(recipe.evaluation).get(part)
            if known is not None and not any(rest.startswith(f"{one}.") for one in known):
                raise UsageError(f"{where} evaluates no such {part}; it has {', '.join(known) or 'none'}")


def with_folders(value: Any, *, cache: Path, own: str) -> Any:
    """A nested value with real folders for `{ADDRESS}` and `{self}` in its texts."""
    if isinstance(value, Mapping):
        return {key: with_folders(one, cache=cache, own=own) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [with_folders(one, cache=cache, own=own) for one in value]
    if not isinstance(value, str):
        return value
    return _FOLDER.sub(lambda found: str(cache / (own if found[1] == "self" else found[1])), value)


class _Builder:
    def __init__(self, ablation: Ablation, size: str) -> None:
        self._ablation, self._name = ablation, size
        self._size: Size = ablation.sizes[size]
        self._made: dict[str, Task] = {}
        self._read: dict[str, str] = {}

    def cell(self, name: str, seed: int) -> Cell:
        arm = self._ablation.arms[name]
        runs: list[Task] = []
        for stage in arm.chain or self._ablation.chain:
            own = self._stage_settings(stage, name, arm)
            recipe = self._ablation.stages[stage].recipe
            title = f"{name}, seed {seed}, {stage}"
            init = runs[-1] if runs else self._start(title, arm, recipe, own, seed=seed)
            runs.append(self._train(title, recipe, own, init=init, seed=seed))
        return Cell(arm=name, seed=seed, runs=tuple(runs))

    def _stage_settings(self, stage: str, name: str, arm: Arm) -> _Placed:
        size, own = self._size, f"arms.{name}"
        by_size = next((one for one in (self._name, size.like) if one in arm.by_size), None)
        of_arm = {f"{own}.set": arm.set} | ({f"{own}.by_size.{by_size}": arm.by_size[by_size]} if by_size else {})
        # What an ablation is about holds at every size, so its settings follow those of the size.
        layers = {
            f"sizes.{self._name}.set": size.set,
            f"sizes.{self._name}.stages.{stage}": size.stages.get(stage, {}),
            f"stages.{stage}.set": self._ablation.stages[stage].set,
        }
        for scope in (ALL, stage):
            for where, values in of_arm.items():
                prefix = f"{scope}."
                found = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
                layers[f"{where}.{scope}"] = found
        return _placed(layers)

    def _train(self, name: str, recipe: str, settings: _Placed, *, init: Task | None, seed: int | None = None) -> Task:
        inputs: dict[str, Task] = {} if init is None else {init.address: init}
        values = {key: (where, self._resolved(value, inputs)) for key, (where, value) in settings.items()}
        # Set in every run of this program.
        fixed: Settings = {
            "data.tokenizer": self._resolved(self._size.tokenizer, inputs),
            "run.dir": "{self}/run",
            "checkpoint.dir": None,
            "checkpoint.init": f"{{{init.address}}}/{_WEIGHTS[init.kind]}" if init else None,
            "checkpoint.allow_random_init": init is None,
        }
        if seed is not None:
            fixed[SEED] = seed
        if self._size.seq_length:
            fixed["data.seq_length"] = self._size.seq_length
        _require_free(settings, fixed)
        loaded = self._load(name, recipe, values, fixed)
        spec = {"recipe": to_dict(loaded), **self._outside(paths_of(loaded))}
        return self._once(Task(kind="train", name=name, spec=spec, inputs=tuple(inputs.values()), recipe=loaded))

    def _load(self, name: str, recipe: str, settings: _Placed, fixed: Settings) -> Recipe:
        path = Path(self._size.recipes) / f"{recipe}.yaml"
        values = {key: value for key, (_, value) in settings.items()} | fixed
        try:
            return load_recipe(path, overrides=[f"{key}={json.dumps(value)}" for key, value in values.items()])
        except UsageError as error:
            raise UsageError(f"{_place(str(error), settings)} (in {name})") from None

    def _start(self, name: str, arm: Arm, recipe: str, settings: _Placed, *, seed: int) -> Task:
        """Weights of an arm's first stage: towers and decoder of ancestors, and a new adaptor."""
        start: Start = arm.start or self._ablation.start
        inputs: dict[str, Task] = {}
        probe = {key: (where, self._resolved(value, {})) for key, (where, value) in settings.items()}
        fixed = {"data.tokenizer": "-"} | ({"data.seq_length": self._size.seq_length} if self._size.seq_length else {})
        model = self._load(name, recipe, probe, fixed).model
        parts = {"llm": start.llm, "siglip": start.siglip} | ({"sam": start.sam or ""} if model.sam else {})
        if parts.get("sam") == "":
            raise UsageError(f"{name}: start.sam: the model has a SAM tower; name the ancestor that gives it")
        sources = {part: self._ancestor(one, inputs) for part, one in parts.items()}
        spec = {"model": to_dict(model), "sources": sources, "seed": seed, **self._outside(sources.values())}
        return self._once(Task(kind="start", name=f"start, seed {seed}", spec=spec, inputs=tuple(inputs.values())))

    def _ancestor(self, name: str, inputs: dict[str, Task]) -> str:
        ancestor: Ancestor = self._size.ancestors[name]
        if ancestor.path is not None:
            return str(Path(ancestor.path).absolute())
        assert ancestor.recipe is not None, "the file was checked"
        layers = {f"sizes.{self._name}.set": self._size.set, f"sizes.{self._name}.ancestors.{name}.set": ancestor.set}
        task = self._train(f"ancestor {name}", ancestor.recipe, _placed(layers), init=None)
        inputs[task.address] = task
        return f"{{{task.address}}}/{_WEIGHTS['train']}"

    def _resolved(self, value: Any, inputs: dict[str, Task]) -> Any:
        """A value with folders of tasks for `corpus:NAME/FILE` and `dataset:NAME`; these become inputs."""
        if isinstance(value, Mapping):
            return {key: self._resolved(one, inputs) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._resolved(one, inputs) for one in value]
        found = _REFERENCE.match(value) if isinstance(value, str) else None
        if found is None:
            return value
        kind, name, rest = found.groups()
        if bool(rest) is (kind == "dataset"):
            raise UsageError(f"{value}: is written {'corpus:NAME/FILE' if kind == 'corpus' else 'dataset:NAME'}")
        if kind == "corpus":
            return self._file_of(self._corpus(name), f"{_CORPUS}/{rest}", inputs)
        dataset = self._size.datasets.get(name)
        if dataset is None:
            raise UsageError(
                f"{value}: size {self._name} has no such data set; it has {', '.join(self._size.datasets)}"
            )
        if dataset.path is not None:
            return str(Path(dataset.path).absolute())
        return self._file_of(self._dataset(name, dataset), name, inputs)

    def _file_of(self, task: Task, name: str, inputs: dict[str, Task]) -> str:
        inputs[task.address] = task
        return f"{{{task.address}}}/{name}"

    def _corpus(self, name: str) -> Task:
        options = self._size.corpora.get(name)
        if options is None:
            raise UsageError(
                f"corpus:{name}: size {self._name} has no such corpus; it has {', '.join(self._size.corpora)}"
            )
        words = ("demo", "--output", f"{{self}}/{_CORPUS}", "--force", *options)
        return self._once(Task(kind="corpus", name=f"corpus {name}", spec={"words": words}))

    def _dataset(self, name: str, dataset: Dataset) -> Task:
        inputs: dict[str, Task] = {}
        files = [self._resolved(f"corpus:{file}", inputs) for file in dataset.inputs]
        tokenizer = self._resolved(self._size.tokenizer, inputs)
        words = ["--input", *files, "--output", f"{{self}}/{name}", "--tokenizer", tokenizer]
        words += ["--seq-length", str(self._size.seq_length), "--workers", "1", *dataset.options]
        spec = {"words": words, **self._outside([tokenizer])}
        return self._once(Task(kind="dataset", name=f"data set {name}", spec=spec, inputs=tuple(inputs.values())))

    def _outside(self, paths: Collection[str]) -> dict[str, Any]:
        """A key for what is read from outside, hashed once; nothing where all of it comes from other tasks."""
        found = contents([path for path in paths if not path.startswith("{") and path not in self._read])
        self._read |= found
        own = {path: self._read[path] for path in paths if path in self._read}
        return {"outside": own} if own else {}

    def _once(self, task: Task) -> Task:
        return self._made.setdefault(task.address, task)


def _placed(layers: Mapping[str, Settings]) -> _Placed:
    """Settings by key; what stands in a later layer counts, and comes after all that an earlier one says."""
    found: _Placed = {}
    for where, settings in layers.items():
        for key, value in settings.items():
            found.pop(key, None)
            found[key] = (f"{where}.{key}", value)
    return found


def _require_free(settings: _Placed, fixed: Collection[str]) -> None:
    """Refuse settings that would be lost, because the program sets the key after them."""
    for key, (where, value) in settings.items():
        for one in fixed:
            inside: Any = {key: value}
            # `training: {seed: 7}` sets it as well.
            for part in (key, *one.removeprefix(key).split(".")[1:]):
                inside = inside.get(part, _NOTHING) if isinstance(inside, Mapping) else _NOTHING
            if (key == one or one.startswith(f"{key}.")) and inside is not _NOTHING:
                hint = {SEED: "use seeds and first_seed", "data.seq_length": "use seq_length of the size"}
                raise UsageError(f"{where}: {one} is set by this program in each run; {hint.get(one, 'remove it')}")


def _place(message: str, settings: _Placed) -> str:
    """A message about an override of `load_recipe`, with the key in the file of the ablation."""
    before, typed, after = message.partition("on the command line")
    if not typed:
        return message
    key = (before.rpartition(" with ")[2] or after.removeprefix(": ")).partition("=")[0].partition(":")[0]
    for own, (where, _) in reversed(settings.items()):
        if own == key or own.startswith(f"{key}.") or key.startswith(f"{own}."):
            return f"{before}in {where}{after}" if before else f"{where}{after}"
    return message


_NOTHING = object()
_CORPUS = "corpus"
_WEIGHTS = {"train": "run/checkpoints", "start": "weights"}
"""Where a task leaves the checkpoint that others start from."""


def program(task: Task, *, cache: Path) -> tuple[str, Sequence[str]]:
    """The module of a task and its words, with real folders."""

    folder = cache / task.address
    if task.kind == "train":
        return "megavl", ["train", str(folder / "recipe.yaml")]
    if task.kind == "start":
        return "launch.ablations.start", [str(folder / "start.json"), str(folder / _WEIGHTS["start"])]
    module = {"corpus": "data_tools.build_corpus", "dataset": "data_tools.preprocess"}[task.kind]
    words: list[str] = with_folders(task.spec["words"], cache=cache, own=task.address)
    return module, words


def files(task: Task, *, cache: Path) -> dict[str, bytes]:
    """Files that a task's folder needs before the program starts, by name."""
    real = with_folders(task.spec, cache=cache, own=task.address)
    if task.kind == "train":
        return {"recipe.yaml": yaml.safe_dump(real["recipe"], sort_keys=False, width=1 << 20).encode()}
    return {"start.json": json.dumps(real, indent=1).encode()} if task.kind == "start" else {}
