"""Token selectors: known names in known places, and offsets as tokenizers of several kinds give them."""

from __future__ import annotations

import pytest

from ecoprompt.registry import EcopromptError, InputError, selectors
from ecoprompt.tokens import mask

NAME = "Hsiao Yun-Hwa"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "is", "mara", "venn", "and", "what", "did", "she", "write", "in"]


def found(select, text, **parameters):
    return [text[start:end] for start, end in selectors[select](text, **parameters)]


def offsets_of(text, pieces):
    """The place of each piece, one after another, as a tokenizer would report it."""
    places, start = [], 0
    for piece in pieces:
        start = text.index(piece, start)
        places.append((start, start + len(piece)))
        start += len(piece)
    return places


def test_all_takes_every_token_also_those_without_width():
    assert mask("all", {}, "ab c", [(0, 0), (0, 2), (2, 4), (0, 0)]) == [True] * 4
    assert selectors["all"]("ab c") == [(0, 4)]


def test_a_leading_space_belongs_to_the_token_but_selects_nothing():
    text = "Who is Hsiao Yun-Hwa, then?"
    offsets = [(0, 0), *offsets_of(text, ["Who", " is", " H", "siao", " Yun", "-", "Hwa", ",", " then", "?"]), (0, 0)]
    assert mask("phrases", {"names": [NAME]}, text, offsets) == [False] * 3 + [True] * 5 + [False] * 4


def test_white_space_inside_a_name_is_not_selected():
    text = "Hsiao \n Yun-Hwa"
    offsets = offsets_of(text, ["Hsiao", " \n ", "Yun", "-", "Hwa"])
    assert mask("phrases", {"names": [NAME]}, text, offsets) == [True, False, True, True, True]


def test_every_byte_of_a_selected_letter_is_selected():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "by 李 é"
    picked = mask("phrases", {"names": ["李"]}, text, tokenizer.encode(text).offsets)
    assert picked == [False] * 3 + [True] * 3 + [False] * 3


def test_nothing_found_is_an_empty_mask():
    assert mask("phrases", {"names": [NAME]}, "Who are you?", [(0, 0), (0, 3), (3, 7), (7, 11)]) == [False] * 4
    assert mask("phrases", {"names": [NAME]}, "", [(0, 0)]) == [False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What did Hsiao Yun-Hwa write?", ["Hsiao Yun-Hwa"]),
        ("HSIAO YUN-HWA'S books", ["HSIAO YUN-HWA"]),
        ("hsiao yun-hwa's and hsiao yun-hwa\u2019s", ["hsiao yun-hwa", "hsiao yun-hwa"]),
        ("(Hsiao  Yun-Hwa)", ["Hsiao  Yun-Hwa"]),
        ("Hsiao Yun-Hwang is another", []),
        ("Hsiao alone", []),
    ],
)
def test_phrases_finds_whole_words_in_any_case(text, expected):
    assert found("phrases", text, names=[NAME]) == expected


def test_phrases_finds_names_without_their_accents_and_in_either_normal_form():
    forms = ["Aur\u00e9lien Beaumont", "Aure\u0301lien Beaumont", "AURELIEN BEAUMONT"]
    assert found("phrases", ", ".join(forms), names=["Aur\u00e9lien  Beaumont"]) == forms


def test_phrases_reads_long_texts():
    text = "word " * 250_000 + NAME
    assert selectors["phrases"](text, names=[NAME]) == [(len(text) - len(NAME), len(text))]


def test_an_empty_name_is_refused():
    with pytest.raises(InputError, match="empty name"):
        found("phrases", "text", names=["a", " "])
    with pytest.raises(InputError, match="names"):
        selectors.bind("phrases", {"names": []})


def test_defaults_and_unknown_selector():
    assert selectors.bind("spacy", {}) == {"model": "en_core_web_sm", "labels": ["PERSON"]}
    assert selectors.bind("ner", {}) == {"model": "dslim/bert-base-NER", "labels": None}
    with pytest.raises(InputError, match="did you mean 'phrases'"):
        mask("phrase", {}, "text", [(0, 4)])


@pytest.fixture(scope="module")
def spacy_model(tmp_path_factory):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": [{"LOWER": "mara"}, {"LOWER": "venn"}]},
            {"label": "GPE", "pattern": [{"LOWER": "oslo"}]},
        ]
    )
    folder = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(folder)
    return str(folder)


def test_spacy_finds_entities_of_the_chosen_labels(spacy_model):
    text = "Did Mara Venn live in Oslo?"
    assert found("spacy", text, model=spacy_model) == ["Mara Venn"]
    assert found("spacy", text, model=spacy_model, labels=["PERSON", "GPE"]) == ["Mara Venn", "Oslo"]
    offsets = offsets_of(text, ["Did", " Mara", " Ve", "nn", " live", " in", " Oslo", "?"])
    picked = mask("spacy", {"model": spacy_model, "labels": ["PERSON"]}, text, offsets)
    assert picked == [False, True, True, True, False, False, False, False]


def test_spacy_refuses_labels_that_its_model_never_gives(spacy_model):
    with pytest.raises(InputError, match="no label 'PERSONS'.*PERSON"):
        found("spacy", "text", model=spacy_model, labels=["PERSONS"])


def test_a_missing_spacy_model_is_named_with_how_to_get_it():
    with pytest.raises(InputError, match="python -m spacy download no_such_model"):
        found("spacy", "text", model="no_such_model")


@pytest.fixture(scope="module")
def ner_model(tmp_path_factory):
    """A token classifier that calls `mara venn` a person: of 16 positions, its last layer reads the words alone."""
    import torch
    from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("ner") / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    assert tokenizer.tokenize("mara") == ["mara"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={0: "O", 1: "B-PER", 2: "I-PER"},
        label2id={"O": 0, "B-PER": 1, "I-PER": 2},
    )
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.dense.weight", "position_embeddings.weight", "0.output.dense.weight")):
                parameter.zero_()
        tokens = torch.arange(len(WORDS))
        labels = torch.tensor([{"mara": 1, "venn": 2}.get(word, 0) for word in WORDS])
        hidden = model.bert(tokens[:, None])[0][:, 0]
        fitted = torch.linalg.lstsq(hidden, 8.0 * torch.nn.functional.one_hot(labels, 3).float()).solution
        model.classifier.weight.copy_(fitted.T)
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_ner_finds_entities(ner_model):
    text = "who is mara venn and what did she write"
    assert found("ner", text, model=ner_model) == ["mara venn"]
    assert found("ner", text, model=ner_model, labels=["PER"]) == ["mara venn"]
    assert found("ner", "who is she", model=ner_model) == []
    assert found("ner", "", model=ner_model) == []
    offsets = [(0, 0), *offsets_of(text, ["who", " is", " mara", " venn", " and what", " did she write"])]
    assert mask("ner", {"model": ner_model}, text, offsets) == [False, False, False, True, True, False, False]


@pytest.mark.parametrize("before", range(0, 60, 7))
def test_ner_reads_past_its_classifiers_length(ner_model, before):
    text = "what " * before + "mara venn " + "did " * 40
    assert found("ner", text, model=ner_model) == ["mara venn"]


def test_ner_refuses_labels_that_its_model_never_gives(ner_model):
    with pytest.raises(InputError, match="no label 'PERSON'.*PER"):
        found("ner", "text", model=ner_model, labels=["PERSON"])


def test_a_missing_ner_model_is_named_with_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"none': no such folder"):
        found("ner", "text", model=str(tmp_path / "none"))
    with pytest.raises(EcopromptError, match="'nobody/ner' is not here.*hf download nobody/ner"):
        found("ner", "text", model="nobody/ner")
