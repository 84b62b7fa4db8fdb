"""Puts the rows of benchmarks to a model in one state, and reads back what it said."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from ecoprompt import processes
from ecoprompt.benchmarks import Benchmark, parse_forget
from ecoprompt.forget import Decision
from ecoprompt.guard import Guard
from ecoprompt.items import Item
from ecoprompt.metrics import reads
from ecoprompt.models import Loaded, encode, render, render_answer
from ecoprompt.pack import TrainedGate, make_forget
from ecoprompt.probe import unpacked
from ecoprompt.recipe import Recipe, Run, digest
from ecoprompt.registry import Progress, benchmarks, metrics
from ecoprompt.results import Store
from ecoprompt.scoring import Request, Room, Sample, answer, log_prob
from ecoprompt.template import fill
from ecoprompt.verdicts import REMEMBERED, Verdicts

JUDGED = 64
"""Prompts that a gate judges at a time where no model is asked."""
GENERATED = ("generation", "samples")
"""What is generated of all that metrics read: answers that a gate can check."""
REREAD = "reread"
"""What metrics read of a generation that another model has read: `read_again` asks for it."""
NEAREST = "nearest"
"""What metrics read of the embeddings that a guard corrupts."""


@dataclass(frozen=True)
class Prepared:
    """A row as it is put to a model: its prompts' token ids, its own first, and the requests by what metrics read."""

    item: Item
    prompts: Mapping[str, list[int]]
    wanted: Mapping[str, Sequence[Request]]


@dataclass(frozen=True)
class Asked:
    """A row put to a model: by what its metrics read, the requests and the keys that their results are stored under.

    `nearest` are its corrupted tokens, each with the one that it then is nearest to.
    """

    item: Item
    keys: dict[str, list[str]]
    wanted: Mapping[str, Sequence[Request]]
    flagged: bool = False
    score: float | None = None
    nearest: tuple[tuple[str, str], ...] = ()

    def requests(self) -> Iterator[tuple[str, Request]]:
        """Each request with the key of its result."""
        for name, keys in self.keys.items():
            yield from zip(keys, self.wanted[name], strict=True)


class Asking:
    """Rows of benchmarks put to one model in any number of states; what several states share is made once.

    `claimed` are the keys that other runs answer, of this model or another, and those of these runs as they come.
    `only` are the metrics that are read, by what the subsets call them; without, all are.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        items: Sequence[Item],
        store: Store,
        claimed: set[str],
        only: frozenset[str] | None = None,
    ) -> None:
        self.only = only
        self.loaded = loaded
        self.recipe = recipe
        self.items = items
        self.store = store
        self.claimed = claimed
        self._prepared: dict[str, list[Prepared]] = {}
        self._verdicts: dict[str, Verdicts] = {}
        self._room = Room(loaded, recipe.model.batch_tokens)

    def ask(self, run: Run, trained: TrainedGate | None, progress: Progress) -> tuple[list[Asked], float]:
        """Ask all rows in the state of `run`; returns what was asked and the seconds that computing it took."""
        prepared = self._prepare(run, progress)
        guard = self._guard(run, trained)
        decided = _decide(guard, prepared)
        asked = [_asked(self.loaded, run, guard, *pair) for pair in zip(prepared, decided, strict=True)]
        seconds = self._compute(run, guard, asked, progress)
        if guard is not None and run.gate is not None and run.gate.check == "answer":
            prompts = [next(iter(one.prompts.values())) for one in prepared]
            refuted = _refuted(guard, prompts, asked, self.store)
            for number, decisions in zip(refuted, _decide(guard, [prepared[row] for row in refuted]), strict=True):
                again = {name: prepared[number].wanted[name] for name in GENERATED if name in asked[number].keys}
                made = _asked(self.loaded, run, guard, replace(prepared[number], wanted=again), decisions)
                asked[number] = replace(made, keys=asked[number].keys | made.keys, wanted=prepared[number].wanted)
            seconds += self._compute(run, guard, asked, progress)
        return asked, seconds

    def _prepare(self, run: Run, progress: Progress) -> list[Prepared]:
        """The rows as they are put to the model behind the prefix of `run`."""
        prefix = _prefix(self.recipe, run)
        if prefix not in self._prepared:
            progress("preparing", 0, 1)
            self._prepared[prefix] = [
                _prepare(self.loaded, item, prefix, self.recipe.seed, self.only) for item in self.items
            ]
        return self._prepared[prefix]

    def _guard(self, run: Run, trained: TrainedGate | None) -> Guard | None:
        if trained is None or run.gate is None or run.tokens is None or run.corruption is None:
            return None
        forget = make_forget(trained, run.gate, run.tokens, run.corruption, run.seed or 0)
        # Answers are checked by `ask`: what is stored for an unflagged prompt is the plain model's, which is any run's.
        forget = replace(forget, check="prompt")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        shared = f"{id(trained)}:{digest(run.gate, run.tokens)}"
        if run.gate.check == "answer":  # what the answers of one run gave away is not the next run's
            return Guard(model, tokenizer, forget)
        if shared not in self._verdicts:
            self._verdicts[shared] = Verdicts(forget, tokenizer, max(REMEMBERED, len(self.items)))
        return Guard(model, tokenizer, forget, self._verdicts[shared])

    def _compute(self, run: Run, guard: Guard | None, asked: Sequence[Asked], progress: Progress) -> float:
        """Compute what no other run does; returns the seconds that it took."""
        seconds = 0.0
        for attached in (None, guard) if guard else (None,):  # an unflagged prompt is the plain model's, for any guard
            rows = [row for row in asked if row.flagged == (attached is not None)]
            new = {key: one for row in rows for key, one in row.requests() if key not in self.claimed}
            self.claimed.update(new)
            todo = list(new.items())
            seconds += answer(self.loaded, todo, self.store, attached, self._room, progress)
        return seconds


def _decide(guard: Guard | None, prepared: Sequence[Prepared]) -> list[dict[str, Decision]]:
    """What `guard` decides of the prompts of each row, by their text; nothing without one."""
    if guard is None:
        return [{} for _ in prepared]
    decisions = iter(guard.decide([ids for row in prepared for ids in row.prompts.values()]))
    return [{text: next(decisions) for text in row.prompts} for row in prepared]


def _asked(
    loaded: Loaded, run: Run, guard: Guard | None, prepared: Prepared, decisions: Mapping[str, Decision]
) -> Asked:
    """A row with the keys of what is asked of it: of a flagged prompt, they depend on how it is corrupted."""
    corrupted = {  # which turns the gate flagged shows in the positions
        text: digest(version("ecoprompt"), run.tokens, run.corruption, run.seed, decision.positions)
        for text, decision in decisions.items()
        if decision.flagged
    }
    wanted = prepared.wanted
    keys = {
        name: [one.key(loaded.fingerprint, corrupted.get(one.prompt)) for one in requests]
        for name, requests in wanted.items()
    }
    score = max((decision.score for decision in decisions.values()), default=None)
    found = Asked(prepared.item, keys, wanted, bool(corrupted), score)
    text, ids = next(iter(prepared.prompts.items()))
    if guard is None or text not in corrupted or not _metric_reads(prepared.item, NEAREST):
        return found
    return replace(found, nearest=guard.nearest(ids, decisions[text]))


def _refuted(guard: Guard, prompts: Sequence[Sequence[int]], asked: Sequence[Asked], store: Store) -> list[int]:
    """The rows that the gate lets through alone and flags together with what the model answered."""
    pairs = [
        (number, str(store.get(key)))
        for number, row in enumerate(asked)
        if not row.flagged
        for name in GENERATED
        for key in row.keys.get(name, ())
    ]
    found = guard.overrule([prompts[number] for number, _ in pairs], [text for _, text in pairs])
    return sorted({number for (number, _), flagged in zip(pairs, found, strict=True) if flagged})


def rereads(item: Item) -> bool:
    """Whether a metric of the row's subset reads how likely another model finds its generation."""
    return _metric_reads(item, REREAD)


def _metric_reads(item: Item, name: str) -> bool:
    return any(name in reads(metric) for metric in benchmarks[item.benchmark].subset(item.subset).metrics.values())


def read_again(loaded: Loaded, asked: Sequence[Asked], store: Store, progress: Progress) -> list[Asked]:
    """Rows that were asked, with the log-probability that an unguarded model gives what was generated after its prompt.

    The prompt is read without a run's prefix. A row of an empty generation is as it was.
    """
    found = []
    for one in asked:
        text = str(store.get(one.keys["generation"][0])) if rereads(one.item) else ""
        if text:
            benchmark = benchmarks[one.item.benchmark]
            before = _answer_to(loaded, benchmark, one.item.prompt, text).partition(text)[0]
            request = Request("log_prob", _rendered(loaded, benchmark, one.item.prompt), before + text)
            keys = {**one.keys, REREAD: [request.key(loaded.fingerprint, None)]}
            one = replace(one, keys=keys, wanted={**one.wanted, REREAD: [request]})
        found.append(one)
    todo = [(one.keys[REREAD][0], one.wanted[REREAD][0]) for one in found if REREAD in one.keys]
    answer(loaded, todo, store, progress=progress)
    return found


def judge(
    recipe: Recipe, run: Run, trained: TrainedGate | None, items: Sequence[Item], progress: Progress
) -> tuple[list[Asked], float]:
    """What a run's gate says of all rows, without a language model; and the seconds that it took."""
    prefix = _prefix(recipe, run)
    started = time.perf_counter()
    if trained is None:
        return [Asked(item, {}, {}) for item in items], 0.0
    processes.check_agreement([prefix, *(item.prompt for item in items)])
    gate, scores = trained.gate, list[float]()

    def score(some: Sequence[Item]) -> list[float]:
        return [float(score) for score in gate.score([prefix + item.prompt for item in some])]

    for found in processes.deal([items[start : start + JUDGED] for start in range(0, len(items), JUDGED)], score):
        scores += [score for part in found for score in part]
        progress("judging the prompts", len(scores), len(items))
    asked = [
        Asked(item, {}, {}, not score <= trained.threshold, score) for item, score in zip(items, scores, strict=True)
    ]
    return asked, time.perf_counter() - started


def _prefix(recipe: Recipe, run: Run) -> str:
    """What stands before every prompt of a run, with the names of the forget set's targets filled in."""
    if run.prefix is None:
        return ""
    targets = parse_forget(recipe.data.forget)[1].targets if recipe.data else ()
    return fill(run.prefix, {"targets": ", ".join(targets)}).strip() + "\n"


def _prepare(loaded: Loaded, item: Item, prefix: str, seed: int, only: frozenset[str] | None) -> Prepared:
    """A row as it is put to the model behind `prefix`.

    A generation, greedy or sampled, may be as long as the benchmark allows prompt and answer together, a run's prefix
    not counted.
    """
    benchmark = benchmarks[item.benchmark]
    subset = benchmark.subset(item.subset)
    texts = {"answer": [item.target], "reference": [item.reference]}
    texts |= {"answers": list(item.answers), "alternatives": list(item.alternatives)}
    asked = [prefix + text for text in item.prompts or (item.prompt,)]
    before = {name: asked[:1] * len(answers) for name, answers in texts.items()}
    if item.prompts:  # of the answers, then of the alternatives
        before |= {"answers": asked[: len(item.answers)], "alternatives": asked[len(item.answers) :]}
    rendered = {text: _rendered(loaded, benchmark, text) for text in asked}
    prompt = rendered[asked[0]]
    requests: dict[str, list[Request]] = {}
    for metric in (metric for key, metric in subset.metrics.items() if only is None or key in only):
        for name in reads(metric):
            name = "generation" if name == REREAD else name
            if name in texts and name not in requests:
                requests[name] = [
                    Request("log_prob", rendered[text], _answer_to(loaded, benchmark, text, answer))
                    for text, answer in zip(before[name], texts[name], strict=True)
                ]
            elif name in ("generation", "samples") and name not in requests:
                bare = _rendered(loaded, benchmark, item.prompt)
                room = max(benchmark.max_length - len(encode(loaded.tokenizer, bare)), 1)
                requests[name] = [Request("generation", prompt, max_new_tokens=room)]
                if name == "samples":
                    chosen = {"seed": seed, "temperature": subset.temperature, "top_p": subset.top_p}
                    numbers = range(subset.samples or 0)
                    requests[name] = [Sample("sample", prompt, "", room, number, **chosen) for number in numbers]
            elif name == "logits":
                requests[name] = [Request("logits", prompt)]
    return Prepared(item, {text: encode(loaded.tokenizer, text) for text in rendered.values()}, requests)


def _rendered(loaded: Loaded, benchmark: Benchmark, text: str) -> str:
    """A prompt as the model reads it."""
    return text if benchmark.raw else render(loaded.tokenizer, [{"role": "user", "content": text}])


def _answer_to(loaded: Loaded, benchmark: Benchmark, text: str, answer: str) -> str:
    """`answer` as it follows the rendered prompt."""
    if benchmark.raw:
        return answer if text[-1:].isspace() else f" {answer}"
    return render_answer(loaded.tokenizer, [{"role": "user", "content": text}], answer)


def row_of(asked: Asked, store: Store, known: dict[Hashable, Mapping[str, Any]]) -> dict[str, Any]:
    """One row of rows.jsonl: what was asked, what came back, and the value of every metric.

    `known` is what was read of rows before, most of which are the same in several runs; what is new is added.
    """
    item = asked.item
    place = (
        item.benchmark,
        item.subset,
        item.index,
        asked.flagged,
        asked.nearest,
        *(key for keys in asked.keys.values() for key in keys),
    )
    if place not in known:
        known[place] = _read(asked, store)
    return {
        "benchmark": item.benchmark,
        "subset": item.subset,
        "forget": benchmarks[item.benchmark].subset(item.subset).forget,
        "index": item.index,
        "prompt": item.prompt,
        "target": item.target,
        "flagged": asked.flagged,
        "score": asked.score,
        **known[place],
    }


def _read(asked: Asked, store: Store) -> dict[str, Any]:
    """What was generated for a row, and the `values` of its metrics."""
    stored = {name: [store.get(key) for key in keys] for name, keys in asked.keys.items()}
    read: dict[str, Any] = {"target": asked.item.target, "flagged": float(asked.flagged), NEAREST: asked.nearest}
    for name, found in stored.items():
        if name == "logits":  # read with those of other rows, by `add_together`
            continue
        if name == "generation":
            read[name] = found[0]
        elif name == "samples":
            read[name] = found
        else:
            probabilities = [log_prob(value) for value in found]
            read[name] = probabilities if name in ("answers", "alternatives") else probabilities[0]
    subset = benchmarks[asked.item.benchmark].subset(asked.item.subset)
    values = {
        name: metrics[metric](*(read[part] for part in reads(metric)))
        for name, metric in subset.metrics.items()
        if read.keys() >= set(reads(metric))
    }
    nearest = {NEAREST: asked.nearest} if asked.nearest else {}
    return {name: read[name] for name in GENERATED if name in read} | nearest | {"values": values}


def add_together(asked: Sequence[Asked], rows: Sequence[dict[str, Any]], store: Store) -> None:
    """Give `rows`, which these are, the values of metrics that see the rows of a subset together."""
    subsets: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(asked):
        if "logits" in one.keys:
            subsets.setdefault((one.item.benchmark, one.item.subset), []).append(number)
    for (benchmark, subset), numbers in subsets.items():
        logits = [unpacked(store.get(asked[number].keys["logits"][0])) for number in numbers]
        places = [asked[number].item.place for number in numbers]
        for name, metric in benchmarks[benchmark].subset(subset).metrics.items():
            values = metrics[metric](logits, places) if metrics[metric].together else [None] * len(numbers)
            for number, value in zip(numbers, values, strict=True):
                if value is not None:
                    rows[number]["values"] = {**rows[number]["values"], name: value}
