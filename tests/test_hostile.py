"""Packs, classifiers and recipes of a stranger: nothing runs, nothing outside is read, one line says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
import tomllib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from test_gate import TOY, roberta
from typer.testing import CliRunner

from ecoprompt import hub
from ecoprompt.cli import app
from ecoprompt.gate import transformer
from ecoprompt.pack import FILES, PACK, TrainedGate, load_forget, save_pack, train_classifier
from ecoprompt.recipe import load_recipe, parse_recipe
from ecoprompt.registry import EcopromptError, InputError
from ecoprompt.template import evaluate as value_of
from ecoprompt.template import fill, template_names

OPENED: list[str] = []
WATCHING = [False]


def _hook(event, arguments):
    if WATCHING[0] and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


class Bomb:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pack with a linear gate, one with a classifier, and that classifier as it would be published."""
    folder = tmp_path_factory.mktemp("made")
    recipe = load_recipe("quickstart", ["gate.features=4096", "gate.edits=false"])
    linear, _ = train_classifier(recipe, folder)
    published = Path(roberta(folder / "published"))
    save_pack(
        folder / "transformer", recipe, TrainedGate(transformer(None, 0, classifier=str(published)), 0.5, []), 0, ""
    )
    return {"linear": linear, "transformer": folder / "transformer", "published": published}


@pytest.fixture
def outside(tmp_path):
    """What must not be touched: secrets, and the mark `ran` that hostile code would leave."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.toml").write_text('secret = "do not read"\n')
    (folder / "secret.json").write_text('{"secret": "do not read"}')
    save_file({"weights": np.ones(2, np.float32), "intercept": np.zeros(1)}, folder / "secret.safetensors")
    return folder


def refused(reference, outside, words, capfd):
    """What the command says of a hostile reference; one line, exit status 2, in time, with nothing run or read."""
    OPENED.clear()
    WATCHING[0] = True
    started = time.perf_counter()
    try:
        result = CliRunner().invoke(app, ["chat", "--model", "quickstart", "--forget", str(reference)], input="hello\n")
    finally:
        WATCHING[0] = False
    assert time.perf_counter() - started < 20
    assert not (outside / "ran").exists()
    assert not [path for path in OPENED if str(outside) in os.path.realpath(path)]
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("ecoprompt: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert "do not read" not in result.stderr
    assert result.stderr[:-1].isprintable()


def test_the_canaries_sing(made, outside, tmp_path, capfd):
    """A read outside and code that runs would be seen."""
    WATCHING[0] = True
    (outside / "secret.toml").read_text()
    WATCHING[0] = False
    assert str(outside / "secret.toml") in OPENED
    pickle.loads(pickle.dumps(Bomb(outside / "ran")))
    with pytest.raises(AssertionError):
        refused(made["linear"], outside, "", capfd)


def edit(name, old, new):
    def attack(pack, outside):
        text = (pack / name).read_text()
        assert old in text
        (pack / name).write_text(text.replace(old, new.replace("OUTSIDE", str(outside)), 1))

    return attack


def link(name, target):
    def attack(pack, outside):
        path = pack / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(outside / target if target else outside)

    return attack


def bomb(name):
    def attack(pack, outside):
        (pack / name).write_bytes(pickle.dumps(Bomb(outside / "ran")))

    return attack


def script(name):
    def attack(pack, outside):
        (pack / name).write_text(f"import os\nos.mkdir({str(outside / 'ran')!r})\n")

    return attack


def fifo(name):
    def attack(pack, outside):
        (pack / name).unlink()
        os.mkfifo(pack / name)

    return attack


def weights(change):
    def attack(pack, outside):
        path = pack / "gate" / "gate.safetensors"
        save_file(change(load_file(path)), path)

    return attack


def header(entries, size=0, length=None):
    """A safetensors file whose header says what it likes; `size` bytes of weights follow, as a hole in the file."""

    def attack(pack, outside):
        raw = json.dumps(entries).encode()
        path = next(pack.rglob("*.safetensors"))
        with path.open("wb") as file:
            file.write((len(raw) if length is None else length).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + size)

    return attack


def cut(pack, outside):
    path = next(pack.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def write(name, text):
    def attack(pack, outside):
        (pack / name).write_text(text)

    return attack


def many_files(pack, outside):
    for number in range(1100):
        (pack / "gate" / f"{number}.txt").touch()


F32 = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}
BIAS = {"dtype": "F64", "shape": [1], "data_offsets": [2**33, 2**33 + 8]}
SPACY = 'select = "spacy"\nmodel = "hostile_package"\nlabels = ["PERSON"]'
PACKS = {
    "traversal in the kind": (edit(PACK, '"linear"', '"../../outside"'), "no gate kind"),
    "a pickle as the kind": (edit(PACK, '"linear"', '"pickle"'), "no gate kind"),
    "control codes in the kind": (edit(PACK, '"linear"', '"\\u001b[2J\\u001b]0;owned"'), "no gate kind"),
    "a kind of a million letters": (edit(PACK, '"linear"', f'"{"x" * 10**6}"'), "no gate kind"),
    "a link as forget.toml": (link(PACK, "secret.toml"), "link that leads out"),
    "a link as the gate's folder": (link("gate", ""), "link that leads out"),
    "a link as the weights": (link("gate/gate.safetensors", "secret.safetensors"), "link that leads out"),
    "a link as the settings": (link("gate/gate.toml", "secret.toml"), "link that leads out"),
    "a link as the card": (link("README.md", "secret.toml"), "link that leads out"),
    "a pipe as the settings": (fifo("gate/gate.toml"), "not a regular file"),
    "a pipe as forget.toml": (fifo(PACK), "holds no forget.toml"),
    "a pickle beside the weights": (bomb("gate/pytorch_model.bin"), "may hold code"),
    "a pickle as the weights": (bomb("gate/gate.safetensors"), "safetensors"),
    "a checkpoint at the top": (bomb("model.pt"), "may hold code"),
    "a pickle in a folder of its own": (bomb("README.pkl"), "may hold code"),
    "a module": (script("gate/gate.py"), "may hold code"),
    "a header that claims exabytes": (header({"weights": F32}, length=2**60), "not a safetensors file"),
    "a header that claims gigabytes": (header({"weights": F32, "intercept": BIAS}), "not a safetensors file"),
    "two thousand million features": (
        header({"weights": F32, "intercept": BIAS}, 2**33 + 8),
        "more than 67108864 weights",
    ),
    "a header of small offsets": (header({"weights": {**F32, "data_offsets": [0, 8]}}, 8), "not a safetensors file"),
    "a header of many sides": (header({"weights": {**F32, "shape": [2**40] * 200_000}}), "not a safetensors file"),
    "a header of negative sides": (
        header({"weights": {**F32, "shape": [-1, -F32["shape"][0]]}}, 2**33),
        "not a safetensors file",
    ),
    "a header that is no object": (header([1, 2]), "not a safetensors file"),
    "no header": (write("gate/gate.safetensors", ""), "not a safetensors file"),
    "cut weights": (cut, "not a safetensors file"),
    "weights that are not numbers": (weights(lambda t: {**t, "weights": t["weights"] * np.nan}), "finite weights"),
    "an infinite intercept": (weights(lambda t: {**t, "intercept": t["intercept"] + np.inf}), "finite weights"),
    "weights in a square": (weights(lambda t: {**t, "weights": t["weights"].reshape(64, 64)}), "finite weights"),
    "an endless window": (edit("gate/gate.toml", "window = 32", f"window = {10**12}"), "'window'"),
    "n-grams of a million words": (edit("gate/gate.toml", "word_ngrams = 2", "word_ngrams = 1000000"), "'word_ngrams'"),
    "nested too deeply": (write(PACK, f"x = {'[' * 10_000}"), "nested too deeply"),
    "nested too deeply, whole": (write(PACK, f"x = {'[' * 100}{']' * 100}"), "nested too deeply"),
    "a key of many steps": (write(PACK, "a." * 100_000 + "a = 1"), "more than 500 dots"),
    "a key of many quoted steps": (
        write(PACK, 'x = {"a b".' + "'a'.\"a\"." * 100_000 + "a = 1}"),
        "more than 500 dots",
    ),
    "a header of many steps": (write(PACK, "[" + "a . " * 100_000 + "a]"), "more than 500 dots"),
    "lines of many steps": (write(PACK, "".join(f"[t{n}.{'a.' * 400}a]\n" for n in range(1000))), "nested too deeply"),
    "a large file": (write(PACK, "# " + "x" * (1 << 21)), "more than 1048576 bytes"),
    "a large number": (write(PACK, "seed = 0x" + "f" * 100_000), "more than 64 bits"),
    "a large decimal number": (write(PACK, "seed = " + "9" * 100_000), "not a forget pack"),
    "a key twice": (edit(PACK, "format = 1", "format = 1\nformat = 1"), "not a forget pack"),
    "a model of tokens elsewhere": (
        edit(PACK, 'select = "all"', 'select = "ner"\nmodel = "OUTSIDE"'),
        "'tokens.model'",
    ),
    "a package as a spaCy model": (edit(PACK, 'select = "all"', SPACY), "'tokens.model'"),
    "more than all of the dimensions": (edit(PACK, "dims = 1", f'dims = "{"9" * 10**6}%"'), "'corruption.dims'"),
    "control codes in the dimensions": (edit(PACK, "dims = 1", 'dims = "\\u001b[2J25%"'), "'corruption.dims'"),
    "an infinite strength": (edit(PACK, "strength = 7.0", "strength = inf"), "'corruption.strength'"),
    "a threshold that is no number": (edit(PACK, "threshold = 0.5", "threshold = nan"), "'gate.threshold'"),
    "a thousand files": (many_files, "more than 1000 files"),
}


@pytest.mark.parametrize(("attack", "words"), PACKS.values(), ids=PACKS.keys())
def test_a_hostile_pack_is_refused(made, outside, tmp_path, attack, words, capfd, monkeypatch):
    package = tmp_path / "path"
    (package / "hostile_package-1.dist-info").mkdir(parents=True)
    (package / "hostile_package-1.dist-info" / "METADATA").write_text("Name: hostile_package\nVersion: 1\n")
    script("hostile_package.py")(package, outside)
    monkeypatch.syspath_prepend(package)
    pack = Path(shutil.copytree(made["linear"], tmp_path / "pack"))
    attack(pack, outside)
    refused(pack, outside, words, capfd)


def config(**changes):
    def attack(folder, outside):
        path = folder / "config.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, **json.loads(json.dumps(changes).replace("OUTSIDE", str(outside)))}))

    return attack


def tokenizer_config(**changes):
    def attack(folder, outside):
        path = folder / "tokenizer_config.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, **json.loads(json.dumps(changes).replace("OUTSIDE", str(outside)))}))

    return attack


def both(*attacks):
    def attack(folder, outside):
        for one in attacks:
            one(folder, outside)

    return attack


def tensors(change):
    def attack(folder, outside):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return attack


def without_weights(folder, outside):
    (folder / "model.safetensors").unlink()


def shards_elsewhere(folder, outside):
    names = load_file(folder / "model.safetensors").keys()
    without_weights(folder, outside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside/secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def slow_pattern(folder, outside):
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text())
    known["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(known))


CODE = both(
    script("modeling_hostile.py"), config(auto_map={"AutoModelForSequenceClassification": "modeling_hostile.M"})
)
CLASSIFIERS = {
    "code of its own": (CODE, "'auto_map' could make other code run"),
    "code of its own for a new type": (both(CODE, config(model_type="hostile")), "'auto_map'"),
    "code of its own in the tokenizer": (
        both(script("t.py"), tokenizer_config(auto_map={"AutoTokenizer": ["t.T", None]})),
        "'auto_map'",
    ),
    "code from elsewhere": (config(auto_map={"AutoConfig": "somebody/else--module.Config"}), "'auto_map'"),
    "an unknown type": (config(model_type="hostile"), "cannot be loaded"),
    "a type that is none": (config(model_type=None), "cannot be loaded"),
    "kernels": (config(quantization_config={"quant_method": "mxfp4"}), "'quantization_config'"),
    "attention of its own": (config(_attn_implementation="somebody/kernels"), "attn_implementation"),
    "weights elsewhere": (config(transformers_weights="OUTSIDE/secret.safetensors"), "'transformers_weights'"),
    "shards elsewhere": (shards_elsewhere, "no model.safetensors"),
    "a vocabulary elsewhere": (tokenizer_config(vocab_file="OUTSIDE/secret.json"), "'vocab_file'"),
    "a tokenizer elsewhere": (tokenizer_config(tokenizer_file="OUTSIDE/secret.json"), "'tokenizer_file'"),
    "inputs of its own": (tokenizer_config(init_inputs=["OUTSIDE/secret.json"]), "'init_inputs'"),
    "an adapter": (write("adapter_config.json", '{"base_model_name_or_path": "../outside"}'), "an adapter"),
    "a pickle alone": (both(without_weights, bomb("pytorch_model.bin")), "pytorch_model.bin may hold code"),
    "a link as its weights": (link("model.safetensors", "secret.safetensors"), "link that leads out"),
    "a link as its tokenizer": (link("tokenizer.json", "secret.json"), "link that leads out"),
    "a hidden size of a thousand million": (config(hidden_size=10**9), "'hidden_size'"),
    "a wide layer": (config(intermediate_size=10**7), "'intermediate_size'"),
    "a million layers": (config(num_hidden_layers=10**6), "'num_hidden_layers'"),
    "a vocabulary of all": (config(vocab_size=2**31), "'vocab_size'"),
    "endless positions": (config(max_position_embeddings=10**9), "'max_position_embeddings'"),
    "no heads": (config(num_attention_heads=0), "cannot be loaded"),
    "a size as text": (config(hidden_size="OUTSIDE"), "cannot be loaded"),
    "a thousand million labels": (config(id2label=10**9, num_labels=10**9), "'num_labels'"),
    "three labels": (config(id2label={"0": "a", "1": "b", "2": "c"}), "3 labels, expected 2"),
    "labels that do not tell": (config(id2label={"0": "ham", "1": "spam"}, label2id={"ham": 0, "spam": 1}), "'spam'"),
    "labels that contradict": (config(label2id={"LABEL_0": 1, "LABEL_1": 0}), "contradict each other"),
    "the same label twice": (config(id2label={"0": "LABEL_1", "1": "LABEL_1"}, label2id={"LABEL_1": 1}), "LABEL_1"),
    "no head": (
        tensors(lambda t: {k: v for k, v in t.items() if "classifier" not in k}),
        "the weights lack classifier",
    ),
    "a head of three": (
        tensors(lambda t: {**t, "classifier.out_proj.weight": np.ones((3, 32), np.float32)}),
        "classifier",
    ),
    "cut weights": (cut, "not a safetensors file"),
    "a header that claims gigabytes": (header({"weights": F32}), "not a safetensors file"),
    "weights that are not numbers": (
        tensors(lambda t: {**t, "classifier.dense.bias": t["classifier.dense.bias"] * np.nan}),
        "not finite numbers",
    ),
    "a pattern that never ends": (slow_pattern, "may take for ever"),
    "nested too deeply": (write("config.json", "[" * 100_000), "nested too deeply"),
    "a config that is none": (write("config.json", "[]"), "no JSON object"),
    "a large config": (write("config.json", " " * (1 << 21)), "more than 1048576 bytes"),
    "no config": (lambda folder, outside: (folder / "config.json").unlink(), "config.json"),
    "a tokenizer that is none": (write("tokenizer.json", "{}"), "cannot be loaded"),
}


@pytest.mark.parametrize(("attack", "words"), CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_a_hostile_classifier_is_refused(made, outside, tmp_path, attack, words, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(made["published"], tmp_path / "published"))
    attack(folder, outside)
    (tmp_path / "r.toml").write_text(
        f'[gate]\nclassifier = "{folder}"\n[corruption]\nmethod = "rand_noise_first_n"\nstrength = 1.0\n'
    )
    refused("r.toml", outside, words, capfd)


@pytest.mark.parametrize("name", ["code of its own", "a vocabulary elsewhere", "a pickle alone", "a million layers"])
def test_a_pack_with_a_hostile_classifier_is_refused(made, outside, tmp_path, name, capfd):
    attack, words = CLASSIFIERS[name]
    pack = Path(shutil.copytree(made["transformer"], tmp_path / "pack"))
    attack(pack / "gate", outside)
    refused(pack, outside, words if "code" not in name and "pickle" not in name else "may hold code", capfd)


def test_code_in_a_chat_template_stays_text(made, outside, tmp_path):
    """The gate never fills a chat template, and a pickle that lies beside safetensors is not opened."""
    folder = Path(shutil.copytree(made["published"], tmp_path / "published"))
    code = "{{ cycler.__init__.__globals__.os.mkdir('" + str(outside / "ran") + "') }}"
    tokenizer_config(chat_template=code)(folder, outside)
    (folder / "chat_template.jinja").write_text(code)
    bomb("training_args.bin")(folder, outside)
    bomb("pytorch_model.bin")(folder, outside)
    gate = transformer(None, 0, classifier=str(folder))
    assert gate.score(["hello"]).shape == (1,)
    assert not (outside / "ran").exists()


@pytest.mark.parametrize(
    ("labels", "flagged"),
    [
        (None, 1),
        ({"0": "LABEL_0", "1": "LABEL_1"}, 1),
        ({"0": "retain", "1": "forget"}, 1),
        ({"0": "forget", "1": "retain"}, 0),
    ],
)
def test_labels_are_read_the_right_way_round(made, tmp_path, labels, flagged):
    folder = Path(shutil.copytree(made["published"], tmp_path / "published"))
    if labels:
        config(id2label=labels, label2id={name: int(number) for number, name in labels.items()})(folder, folder)
    straight = transformer(None, 0, classifier=str(made["published"])).score(TOY.positive[:4])
    gate = transformer(None, 0, classifier=str(folder))
    np.testing.assert_allclose(gate.score(TOY.positive[:4]), straight if flagged else 1 - straight, atol=1e-6)
    gate.save(tmp_path / "kept")
    again = transformer(None, 0, classifier=str(tmp_path / "kept"))
    np.testing.assert_allclose(again.score(TOY.positive[:4]), gate.score(TOY.positive[:4]), atol=1e-6)


@pytest.mark.parametrize("reference", ["../evil/pack", "a/../b", "a/b/c", "https://x/y", "a/b\x1b[2J", "/no/such/pack"])
def test_a_name_that_is_no_hub_id_never_reaches_the_hub(reference, monkeypatch):
    monkeypatch.setattr(hub, "out_of_reach", lambda: pytest.fail("asked the Hub"))
    with pytest.raises(InputError):
        load_forget(reference)


def test_only_the_files_of_a_pack_are_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(hub, "out_of_reach", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path))
    with pytest.raises(InputError, match="forget.toml"):
        load_forget("somebody/pack")
    assert asked == {"allow_patterns": list(FILES)}
    there = ["forget.toml", "gate/gate.toml", "gate/config.json", "gate/model.safetensors", "gate/pytorch_model.bin"]
    there += ["gate/../../../evil.json", "../forget.toml", "gate/x/config.json", "gate/modeling.py", "huge.safetensors"]
    assert list(filter_repo_objects(there, allow_patterns=asked["allow_patterns"])) == there[:4]
    assert not any(mark in name for name in FILES for mark in "*?[")


BOMBS = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops in loops in loops": "{% for a in t %}{% for b in t %}{% for c in t %}x{% endfor %}{% endfor %}{% endfor %}",
    "a long product": "{{ 'x' * 9999999999 }}",
    "a long power": "{{ 9 ** 9 ** 9 }}",
    "a long centre": "{{ 'x' | center(9999999999) }}",
    "a long format": "{{ '%9999999999d' | format(1) }}",
    "a long modulo": "{{ '%9999999999d' % 1 }}",
    "a long method": "{{ '{:9999999999}'.format(1) }}",
    "a long justification": "{{ 'x'.ljust(9999999999) }}",
    "growing replacements": "{{ t" + "|replace('e', 'eeeeeeee')" * 40 + " }}",
    "growing joins": "{{ t" + "|join('xxxxxxxx')" * 40 + " }}",
    "doubling": "{% set n = namespace(x='x') %}" + "{% set n.x = n.x ~ n.x %}" * 60 + "{{ n.x }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [t] recursive %}{{ loop([a]) }}{% endfor %}",
    "filler": "{{ lipsum(9999999) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long text": "x" * 100_000,
    "lists written out": "{{ t" + "|list|string" * 20 + " }}",
    "lists written out by ~": "{{ " + "([" * 12 + "t" + "] ~ '')" * 12 + " }}",
    "many joins": "{{ " + " ~ ".join(["t|list|join('12345678901234567890')"] * 400) + " }}",
    "many names": "{{ " + "~".join(["t"] * 3000) + " }}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS.keys())
def test_a_hostile_template_is_refused_at_once(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    with pytest.raises(InputError, match="template"):
        fill(template, {"t": "the text", "targets": "x"})
    assert time.perf_counter() - started < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["loops for ever", "a long product", "globals", "nested brackets"])
def test_a_recipe_with_a_hostile_prefix_is_refused(name, tmp_path):
    recipe = {"model": {"name": "quickstart"}, "run": {"original": {"prefix": BOMBS[name]}}}
    with pytest.raises(InputError, match="'run.original.prefix': template"):
        parse_recipe(recipe, "r.toml")


def test_the_output_of_a_template_is_bounded():
    started = time.perf_counter()
    with pytest.raises(InputError, match="gets longer than"):
        fill("{% for a in t %}{% for b in t %}{{ t }}{% endfor %}{% endfor %}", {"t": "x" * 5000})
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("parts", ["~".join(["t|list|join('1234567890')"] * 20), "[" + ",".join(["t"] * 60) + "]"])
def test_what_an_expression_makes_is_bounded(parts):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="gets longer than"):
            value_of(parts, {"t": "x" * 20_000})
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [3, None, ["a"]])
def test_a_filter_of_texts_refuses_what_is_none(value):
    with pytest.raises(InputError, match="'unbracketed' takes a text, found "):
        fill("{{ t | unbracketed }}", {"t": value})


def test_what_prompts_need_is_still_filled():
    template = (
        "About {{ subject | replace('_', ' ') | title }}: {{ title.split(' - ')[0].strip() }}"
        "{% for choice in choices %}\n{{ 'ABCD'[loop.index0] }}. {{ choice }}{% endfor %}"
        "{% if note is defined and note %} ({{ note }}){% endif %}\n{{ choices | join(', ') }}"
    )
    row = {"subject": "high_school", "title": "News - BBC", "choices": ["x", "y"], "note": ""}
    assert fill(template, row) == "About High School: News\nA. x\nB. y\nx, y"
    assert template_names(template) == {"subject", "title", "choices", "note"}


RECIPES = {
    "a name that leads elsewhere": ('name = "../../outside"\n', "'name'"),
    "a name of a thousand letters": (f'name = "{"x" * 1000}"\n', "'name'"),
    "nested too deeply": (f"x = {'{a=' * 5000}1{'}' * 5000}\n", "nested too deeply"),
    "a key of many steps": ("a" + ".a" * 200_000 + " = 1\n", "more than 500 dots"),
    "a large file": ("# x\n" * 400_000, "more than 1048576 bytes"),
    "a large number": ("seed = 0x" + "f" * 50_000 + "\n", "more than 64 bits"),
    "a sweep without end": (
        '[sweep]\n"seed" = [' + "1," * 2000 + "]\n" + '"corruption.strength" = [' + "1," * 2000 + "]\n",
        "4000000 combinations",
    ),
    "a gate of two thousand million features": ("[gate]\nfeatures = 2147483648\n", "'gate.features'"),
    "a classifier that is no Hub id": ('[gate]\nclassifier = "../../../no/such"\n', "classifier '../../../no/such'"),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES.keys())
def test_a_hostile_recipe_is_refused(text, words, outside, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rest = '[corruption]\nmethod = "rand_noise_first_n"\nstrength = 1.0\n'
    (tmp_path / "r.toml").write_text(text + rest)
    refused("r.toml", outside, words, capfd)
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "r.toml"}


def test_a_model_with_code_of_its_own_is_refused_without_asking(model_folder, outside):
    """Transformers would ask on standard input whether to run it, and the next prompt might be "yes"."""
    script("modeling_hostile.py")(model_folder, outside)
    config(model_type="hostile", auto_map={"AutoConfig": "modeling_hostile.C"})(model_folder, outside)
    result = CliRunner().invoke(app, ["chat", "--model", str(model_folder)], input="y\ny\ny\n")
    assert not (outside / "ran").exists()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not load" in result.stderr


def test_an_honest_pack_loads_beside_its_papers(made, tmp_path):
    """What `hf download` and git leave in a folder does no harm, nor do a licence and pictures."""
    pack = Path(shutil.copytree(made["linear"], tmp_path / "pack"))
    for name in (".git/hooks/pre-commit.py", ".cache/huggingface/download/x.bin", "LICENSE", "picture.png"):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_text("x")
    (pack / "NOTICE").symlink_to(pack / "LICENSE")
    assert load_forget(str(pack)).threshold == 0.5
    assert tomllib.loads((pack / PACK).read_text())["gate"]["kind"] == "linear"
    with pytest.raises(EcopromptError):
        load_forget("somebody/something")
