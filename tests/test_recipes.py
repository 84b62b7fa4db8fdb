"""Every recipe in the repository parses, binds and dry-runs, with neither torch nor a model nor a network."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from ecoprompt import models, planning
from ecoprompt.lessons import baseline_table, model_names
from ecoprompt.recipe import load_recipe, parse_recipe, resolve_runs, shipped
from ecoprompt.registry import benchmarks, corruptions, methods, selectors
from ecoprompt.similarity import BERT

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("recipes/*.toml"), *ROOT.glob("tests/recipes/*.toml")])
pytestmark = pytest.mark.usefixtures("_at_the_root")


@pytest.fixture
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request):
    """A recipe's file; where its local data is not there, the recipe is read as if it named none."""
    return request.param


@pytest.fixture
def recipe(path):
    root = tomllib.loads(path.read_text(encoding="utf-8")).get("data", {}).get("root")
    if root is not None and not Path(root).is_dir():
        pytest.skip(f"needs {root}")
    return load_recipe(str(path))


def test_there_are_recipes():
    assert {"quickstart", "tofu"} <= set(shipped())
    assert shipped().keys() == {
        path.stem for path in RECIPES if path.parent.name == "recipes" and path.parent.parent == ROOT
    }


def test_it_parses_and_its_document_reads_the_same(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    assert tomllib.loads(tomli_w.dumps(recipe.document())) == recipe.document()
    assert parse_recipe(recipe.document(), "here").document() == recipe.document()


def test_it_binds(path):
    recipe = load_recipe(str(path))
    for run in resolve_runs(recipe):
        if run.model.name is not None and not run.model.name.startswith("."):
            models.resolve(run.model.name)
        if run.guarded:
            assert run.gate.kind in ("linear", "transformer")
            if run.corruption is not None:
                corruptions.bind(run.corruption.method, run.corruption.parameters)
            selectors.bind(run.tokens.select, run.tokens.parameters)


def test_a_recipe_without_a_model_or_a_corruption_is_one_that_asks_no_model(path):
    recipe = load_recipe(str(path))
    asks = any(benchmarks[table.benchmark].asks_model for table in recipe.evaluate)
    assert all(run.model.name is not None for run in resolve_runs(recipe)) or not asks
    assert all(run.corruption is not None for run in resolve_runs(recipe) if run.guarded) or not asks


GENERAL = [
    *("allenai/ai2_arc", "google/boolq", "tau/commonsense_qa", "allenai/openbookqa", "ybisk/piqa"),
    *("allenai/social_i_qa", "domenicrosati/TruthfulQA", "allenai/winogrande"),
]
"""Where the nine sets of general questions for gates are."""
ZEPHYR, PRESS = "HuggingFaceH4/zephyr-7b-beta", "chrisliu298/bbc_news_classifier"
NEWS = ["RealTimeData/bbc_news_alltime", "vblagoje/cc_news"]
BOOKS = [f"books/{name} (a file of your own)" for name in ("alice_in_wonderland", "adventures_of_sherlock_holmes")]
PHI = ["./phi-1_5_retain90 (a folder of your own)", "locuslab/tofu_ft_phi-1.5"]
FETCHES = {
    "bbc-news": [*NEWS, "allenai/OLMo-1.7-7B-hf", PRESS, BERT],
    "copyright-ablation": [*NEWS, PRESS, BERT],
    "book": [*BOOKS, "./book_retain (a folder of your own)", "allenai/OLMo-1B-hf"],
    "hp-book": [
        *("books/hp_book (a file of your own)", "swj0419/BookMIA", "allenai/OLMo-1.7-7B-hf"),
        *("./olmo-1.7-7b_hp_book (a folder of your own)", "chrisliu298/hp_book_classifier", BERT),
    ],
    "general": [
        *("cais/mmlu", "allenai/ai2_arc", "tau/commonsense_qa", "Rowan/hellaswag", "allenai/openbookqa"),
        *("truthfulqa/truthful_qa", "allenai/winogrande", "ybisk/piqa", "allenai/social_i_qa", "google/boolq"),
        *(ZEPHYR, "chrisliu298/wmdp_classifier"),
    ],
    "wmdp": ["cais/wmdp", "cais/mmlu", ZEPHYR, "chrisliu298/wmdp_classifier"],
    **{
        f"mmlu-{subject}": ["cais/mmlu", ZEPHYR, f"chrisliu298/mmlu-{subject}_classifier"]
        for subject in ("economics", "law", "physics")
    },
    **dict.fromkeys(
        ["tofu", "tofu-ablation"],
        ["locuslab/TOFU", *PHI, "chrisliu298/tofu_forget10_classifier", "dslim/bert-base-NER"],
    ),
    "tofu-baselines": [
        *("locuslab/TOFU", "microsoft/phi-1_5", "chrisliu298/tofu_forget10_classifier", "dslim/bert-base-NER")
    ],
    "robustness": [
        *("locuslab/TOFU", "cais/mmlu", "domenicrosati/TruthfulQA", "tau/commonsense_qa", "allenai/ai2_arc"),
        "ybisk/piqa",
    ],
    "gate-tofu": ["locuslab/TOFU", *GENERAL, "cais/mmlu"],
    "gate-news": [*NEWS, *GENERAL, "cais/mmlu"],
    "gate-book": [*BOOKS, *GENERAL, "cais/mmlu"],
    "gate-wmdp": [
        *(f"wmdp_synthetic/{name} (a file of your own)" for name in ("bio", "chem", "cyber")),
        *("cais/mmlu", "cais/wmdp", *GENERAL),
    ],
    **dict.fromkeys([f"gate-mmlu-{subject}" for subject in ("economics", "law", "physics")], ["cais/mmlu", *GENERAL]),
}
"""What each recipe needs of others; the rest need nothing."""


def test_it_dry_runs(path, recipe):
    planned = planning.plan(recipe)
    tables = {"search": recipe.optimize, "finetune": recipe.finetune, "baseline": recipe.baseline}
    told = {name for name, table in tables.items() if table}
    assert set(planned) == {"recipe", "runs", "rows", "fetches", "devices"} | told
    assert planned["recipe"] == recipe.document()
    assert planned["fetches"] == FETCHES.get(path.stem, [])
    json.dumps(planned)
    if path.stem.startswith("gate-"):
        name = recipe.data.forget.partition("/")[0]
        assert planned["runs"] == {}
        assert set(planned["rows"]) == {name, *recipe.data.checks}
        assert {"positive", "negative"} <= set(planned["rows"][name])
        return
    guarded = {name.partition("[")[0] for name, run in planned["runs"].items() if run["guarded"]}
    assert guarded == {"eco"} | (WMDP_SETTINGS.keys() if path.stem == "wmdp" else set())
    swept = math.prod(map(len, recipe.sweep.values()))
    assert swept == 52 or not path.stem.endswith("ablation")
    points = swept * len(guarded)
    assert sum(run["guarded"] for run in planned["runs"].values()) == points
    asked = [benchmarks[name] for name in planned["rows"] if benchmarks[name].asks_model]
    assert not asked or "original" in planned["runs"]
    compared = any(not one.chance(column) for one in asked for column in one.forget_columns())
    assert not compared or "retain" in planned["runs"]  # what a model scores that knows nothing is known of choices
    for name, rows in planned["rows"].items():
        assert list(rows) == list(benchmarks[name].subsets)
        mixed = {subset for subset in rows if benchmarks[name].subset(subset).rows != "all"}  # told by the data alone
        mixed |= {"passages"} if name == "book_mia" else set()  # how long a text of the user's own is
        assert all(count > 0 for subset, count in rows.items() if subset not in mixed or count is not None)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("general", ["evaluate.subsets=['piqa']"], ["ybisk/piqa", ZEPHYR, "chrisliu298/wmdp_classifier"]),
        ("gate-news", [f"gate.classifier={PRESS}", "gate.threshold=0.99"], [*FETCHES["gate-news"], PRESS]),
        ("tofu", ["data.checks=['mmlu_test']"], FETCHES["tofu"]),
        ("mmlu-law",
         ['gate.threshold={ calibrate = "conformal", false_positive_rate = 0.01 }', "data.checks=['general']"],
         ["cais/mmlu", *GENERAL, ZEPHYR, "chrisliu298/mmlu-law_classifier"]),
    ],
)  # fmt: skip
def test_what_is_fetched_follows_from_what_is_read(name, overrides, expected):
    assert planning.plan(load_recipe(name, overrides))["fetches"] == expected


WMDP_SETTINGS = {
    "eco-full": ("rand_noise_first_n", {"dims": "100%", "strength": 50.0}),
    "eco-zero-out": ("zero_out_top_k", {"dims": "100%"}),
    "eco-sign-flip": ("flip_sign_top_k", {"dims": "100%"}),
}


def test_wmdp_is_the_papers_experiment():
    runs = {run.name: run for run in resolve_runs(load_recipe("wmdp"))}
    told = {name: (run.corruption.method, run.corruption.parameters) for name, run in runs.items() if run.guarded}
    assert told == {"eco": ("rand_noise_first_n", {"dims": 1, "strength": 1e6}), **WMDP_SETTINGS}
    assert runs["eco"].gate.threshold == 0.999
    planned = planning.plan(load_recipe("wmdp"))
    assert planned["rows"] == {"wmdp": {"bio": 1273, "chem": 408, "cyber": 1987}, "mmlu_test": {"mmlu": 14042}}


@pytest.mark.parametrize(("subject", "threshold"), [("economics", 0.999), ("law", 0.995), ("physics", 0.999)])
def test_mmlu_is_the_papers_experiment(subject, threshold):
    recipe = load_recipe(f"mmlu-{subject}")
    (eco,) = (run for run in resolve_runs(recipe) if run.guarded)
    published = benchmarks["mmlu"].forget_set(subject).published
    assert {eco.gate.parameters["classifier"]: eco.gate.threshold} == published
    assert eco.gate.threshold == threshold
    assert (eco.corruption.method, eco.corruption.parameters) == ("rand_noise_first_n", {"dims": 1, "strength": 1e6})
    assert list(planning.plan(recipe)["rows"]["mmlu"]) == ["forget", "neighbours", "others"]


def test_general_ability_is_the_papers_eleven_sets():
    planned = planning.plan(load_recipe("general"))
    assert list(planned["rows"]["general_ability"].values()) == [
        *(14042, 2376, 1172, 1221, 10042, 500, 817, 1267, 1838, 1954, 3270)
    ]


@pytest.mark.parametrize(
    "name",
    ["tofu", "wmdp", "mmlu-economics", "mmlu-law", "mmlu-physics", "general", "bbc-news", "hp-book", "book"],
)
def test_prompts_that_tell_a_model_to_forget_name_what(name):
    recipe = load_recipe(name)
    told = {run.name: run.prefix for run in resolve_runs(recipe) if run.prefix is not None}
    assert told.keys() == {"prompting"} | (set() if name == "book" else {"in-context", "refusal"})
    assert all("{{ targets }}" in prefix for prefix in told.values())
    assert benchmarks[recipe.data.forget.partition("/")[0]].forget_set(recipe.data.forget.partition("/")[2]).targets


def test_dry_runs_need_no_torch(tmp_path):
    code = (
        "import sys, ecoprompt.planning as e\nfrom ecoprompt.recipe import load_recipe, shipped\n"
        "[e.plan(load_recipe(name)) for name in shipped()]\n"
        "print([m for m in ('torch', 'transformers', 'sklearn', 'spacy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "[]\n"


PHYSICS_AND_LAW = {"gate-mmlu-physics", "gate-mmlu-law"}
"""Told by "and so on"."""
GATES = {
    "gate-tofu": "tofu/forget10",
    "gate-wmdp": "wmdp/all",
    "gate-mmlu-economics": "mmlu/economics",
    "gate-mmlu-law": "mmlu/law",
    "gate-mmlu-physics": "mmlu/physics",
    "gate-news": "bbc_news/articles",
    "gate-book": "book/alice_in_wonderland",
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_recipe_takes_the_papers_gate_and_a_published_one(name):
    assert load_recipe(name).data.forget == GATES[name]
    own_keys = name == "gate-wmdp"  # of the linear gate, which the others do not have
    paper = load_recipe(name, ['gate={ kind = "transformer" }' if own_keys else "gate.kind=transformer"])
    assert (paper.gate.parameters["base"], paper.gate.parameters["epochs"]) == ("FacebookAI/roberta-base", 30)
    published = load_recipe(
        name,
        ['gate={ classifier = "chrisliu298/some_classifier", threshold = 0.99 }']
        if own_keys
        else ["gate.classifier=chrisliu298/some_classifier", "gate.threshold=0.99"],
    )
    assert published.gate.kind == "transformer"
    assert published.corruption is not None


def test_tofu_is_the_papers_experiment():
    planned = planning.plan(load_recipe("tofu"))
    # The published sizes: 400 questions in forget10, TOFU's own sample of 300 to retain, 100 real authors, 117 facts.
    assert planned["rows"] == {"tofu": {"forget": 400, "retain": 300, "real_authors": 100, "world_facts": 117}}
    assert planned["recipe"]["gate"]["classifier"] == "chrisliu298/tofu_forget10_classifier"
    assert planned["recipe"]["gate"]["threshold"] == 0.9999
    assert list(planned["runs"]) == ["retain", "original", "eco", "prompting", "in-context", "refusal"]


def test_an_ablation_runs_all_settings_of_the_papers_corruptions(path):
    if not path.stem.endswith("ablation"):
        return
    found: dict[str, list] = {}
    for run in resolve_runs(load_recipe(str(path))):
        if run.guarded:
            found.setdefault(run.corruption.method, []).append(run.corruption.parameters)
    noise = [{"dims": 1, "strength": 5.0 * number} for number in range(1, 7)]
    shares = [{"dims": f"{12.5 * number:g}%"} for number in range(1, 9)]
    assert found == {
        "reverse_order": [{}],
        "shuffle": [{}],
        **{f"rand_noise_{which}": noise for which in ("first_n", "rand_n", "top_k")},
        **{f"{what}_{which}": shares for what in ("zero_out", "flip_sign") for which in ("first_n", "top_k")},
    }


@pytest.mark.parametrize("name", ["tofu", "tofu-mini"])
def test_an_ablation_is_its_recipe_otherwise(name):
    folder = "tests/recipes/" if name == "tofu-mini" else "recipes/"
    plain, ablation = (tomllib.loads(Path(f"{folder}{one}.toml").read_text()) for one in (name, f"{name}-ablation"))
    del plain["corruption"], ablation["sweep"]
    plain["run"] = {name: run for name, run in plain["run"].items() if "prefix" not in run}
    assert ablation == plain


def test_an_ablation_serves_another_model_and_other_texts():
    llama = ["model.name=tofu-llama2", "model.chat_template=llama2", "run.retain.model=./llama2_retain90"]
    runs = resolve_runs(load_recipe("tofu-ablation", llama))
    assert {run.model.name for run in runs if run.guarded} == {"tofu-llama2"}
    one = load_recipe("tofu-ablation", ['sweep.corruption=[{ method = "zero_out_top_k", dims = "50%" }]'])
    assert [run.name for run in resolve_runs(one)] == ["retain", "original", "eco"]
    news = ["data.forget=wikinews/2019", "evaluate.benchmark=wikinews", "gate={ threshold = 0.99 }"]
    planned = planning.plan(load_recipe("copyright-ablation", news))
    assert (len(planned["runs"]), list(planned["rows"])) == (54, ["wikinews"])
    assert planned["recipe"]["gate"]["kind"] == "linear"
    own = load_recipe("copyright-ablation", ['gate={ kind = "transformer", threshold = 0.99 }'])
    assert own.gate.parameters["base"] == "FacebookAI/roberta-base"


@pytest.mark.parametrize(("forget", "retain", "rows"), [("forget01", "retain99", 40), ("forget05", "retain95", 200)])
def test_tofu_serves_the_other_forget_sets_by_set(forget, retain, rows):
    overrides = [
        f"data.forget=tofu/{forget}",
        f"gate.classifier=chrisliu298/tofu_{forget}_classifier",
        "gate.threshold=0.99",
        f"run.retain.model=./phi-1_5_{retain}",
        "model.name=llama2",
    ]
    recipe = load_recipe("tofu", overrides)
    assert planning.plan(recipe)["rows"]["tofu"]["forget"] == rows
    assert benchmarks["tofu"].forget_set(forget).retain == retain
    assert {run.model.name for run in resolve_runs(recipe) if run.guarded} == {"llama2"}


def test_the_papers_texts_are_evaluated_with_its_gates():
    news, book = (planning.plan(load_recipe(name)) for name in ("bbc-news", "hp-book"))
    assert news["rows"] == {"bbc_news": {"articles": 500, "others": 500}}
    assert [name for name in news["runs"] if name.startswith("eco")] == [
        f"eco[corruption.strength={strength}]" for strength in (2, 3, 4, 5, 10, 15, 20, 25, 30, 40, 50, 100)
    ]
    assert book["rows"] == {"book_mia": {"passages": None, "other_books": 500}}
    assert {planned["recipe"]["gate"]["threshold"] for planned in (news, book)} == {0.99}


@pytest.mark.parametrize(("name", "rate"), [("tofu-baselines", 1e-5), ("bbc-news", 2e-5)])
def test_one_file_makes_unlearns_and_compares_all_methods(name, rate):
    recipe = load_recipe(name)
    made = {f"./results/{name}/models/{folder}" for folder in model_names(recipe).values()}
    assert made == {recipe.model.name, recipe.run["retain"].model}
    compared = {run: table.model for run, table in recipe.run.items() if run in methods}
    assert compared == {method: f"./results/{name}/baselines/{method}" for method in methods}
    assert (recipe.finetune.epochs, recipe.finetune.learning_rate) == (5, 2e-5)
    assert (recipe.baseline.epochs, baseline_table(recipe).learning_rate) == (5, rate)


def test_tofu_can_be_sampled_beside_its_own_benchmark():
    recipe = load_recipe("tofu", ["evaluate=[{benchmark='tofu'}, {benchmark='tofu-sampling', limit=100}]"])
    planned = planning.plan(recipe)
    assert planned["rows"]["tofu"]["forget"] == 400
    assert planned["rows"]["tofu-sampling"] == {"forget": 100}


def test_the_repeat_test_is_tofus_recipe_with_another_benchmark():
    swept = 'sweep."corruption.strength"=[1, 5, 10, 15]'
    planned = planning.plan(load_recipe("tofu", ['evaluate=[{ benchmark = "tofu-repeat" }]', swept]))
    assert planned["rows"] == {"tofu-repeat": {"repetition": 400, "reply": 400}}
    assert sum(run["guarded"] for run in planned["runs"].values()) == 4


def _commands(path):
    """What is given by --set in each command of a page."""
    for command in re.findall(
        r"`ecoprompt (\w+(?:-\w+)? [^`]*)`|^ecoprompt (\w+(?:-\w+)? .*)$", path.read_text(), re.M
    ):
        _, name, *words = shlex.split("".join(command), comments=True)
        yield name, [after for word, after in itertools.pairwise(words) if word == "--set"]


def test_the_commands_of_the_paper_dry_run():
    planned = [
        (name, planning.plan(load_recipe(name, given))) for name, given in _commands(ROOT / "docs" / "reproduce.md")
    ]
    assert {name for name, _ in planned} >= {"tofu", "wmdp", "general", "bbc-news", "hp-book", *GATES} - PHYSICS_AND_LAW
    asked = {one["recipe"]["name"]: one for _, one in planned}
    assert list(asked["wmdp-probe"]["rows"]) == ["wmdp-probe"]
    assert list(asked["tofu-repeat"]["rows"]) == ["tofu-repeat"]
    assert sum(run["guarded"] for run in asked["tofu-repeat"]["runs"].values()) == 15
    assert asked["gate-book"]["recipe"]["data"]["forget"] == "book_mia/hp_book"
    assert asked["general-law"]["recipe"]["data"]["forget"] == "mmlu/law"


def test_another_benchmark_does_not_take_the_place_of_a_recipes_results():
    pages = [ROOT / "README.md", ROOT / "recipes" / "wmdp.toml", *ROOT.glob("docs/*.md")]
    told = [line for page in pages for line in page.read_text().splitlines()]
    told = [line for line in told if re.search(r"evaluate=\[\{ benchmark = \"\w+-(probe|repeat)\"", line)]
    assert len(told) == 3
    assert all("--set name=" in line for line in told)


def test_a_sweep_of_the_quick_start_dry_runs():
    recipe = load_recipe("quickstart", ['sweep."corruption.strength"=[1, 5]'])
    assert list(planning.plan(recipe)["runs"]) == [
        "retain",
        "original",
        "eco[corruption.strength=1]",
        "eco[corruption.strength=5]",
    ]
