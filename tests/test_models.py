"""Models: names, loading, messages, fingerprints; and the way from messages to tokens and back to turns."""

from __future__ import annotations

import copy
import json
import re
import shutil
from itertools import pairwise

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from ecoprompt import models
from ecoprompt.models import PLAIN_TEMPLATE, encode, encode_pair, load_model, render, render_answer, to_text
from ecoprompt.recipe import ModelTable
from ecoprompt.registry import EcopromptError, InputError
from ecoprompt.turns import turns

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']"
    " | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + m['content'] + '\n"
    "<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}{{ ('' if loop.index0 == 1 and messages[0]['role'] == 'system' else "
    "bos_token + '[INST] ') + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
STRICT = (  # refuses two questions in a row and a system prompt, as Gemma's does
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == "
    "'assistant' else 'user') + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = models.aliases()["phi-1.5"]["chat_template"]
TEMPLATES = {
    "llama3": LLAMA3,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "strict": STRICT,
    "phi": PHI,
    "plain": PLAIN_TEMPLATE,
}
CHATS = ["llama3", "chatml", "llama2", "strict", "phi", "own"]
MARKUP = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
MARKUP += ["<start_of_turn>", "<end_of_turn>"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def contents(tokenizer, text):
    return [turn.content for turn in turns(tokenizer, text)]


@pytest.fixture(scope="module")
def chat(tokenizer):
    """The tokenizer under a chat template by name; `own` is the template it comes with."""
    made = {}
    for name in [*TEMPLATES, "own"]:
        made[name] = copy.deepcopy(tokenizer)
        made[name].add_tokens([transformers.AddedToken(token, special=True) for token in ["<s>", *MARKUP]])
        made[name].bos_token = "<s>"
        made[name].chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    return made


@pytest.fixture
def settings_of(model_folder):
    return lambda **changed: ModelTable(**{"name": str(model_folder), **changed})


# Names


def test_aliases():
    names = models.aliases()
    assert {"llama3", "llama2", "phi-1.5", "zephyr", "quickstart"} <= set(names)
    assert all(("hub" in alias) != ("path" in alias) for alias in names.values())
    known = {"hub", "path", "architecture", "tokenizer", "chat_template", "code"}
    assert all("architecture" in alias and set(alias) <= known for alias in names.values())
    assert all(name == name.lower() for name in names)
    assert models.resolve("zephyr") == models.Place("HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/zephyr-7b-beta")
    assert models.resolve("phi-1.5") == models.Place("microsoft/phi-1_5", "microsoft/phi-1_5", PHI)
    assert models.resolve("tofu-phi-1.5").tokenizer == "microsoft/phi-1_5"
    assert models.resolve("quickstart").model == str(models.PACKAGE / "quickstart/full")


def test_every_model_of_the_paper_has_an_alias(shared):
    lines = (shared / "data" / "paper_models.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert len(rows) == 171
    named = {re.sub(r"(?<=\d)_(?=\d)", ".", row["name"].lower()).replace("_", "-"): row["hub_id"] for row in rows}
    assert len(named) == 171
    named["yi-1.5-6b"] = "01-ai/Yi-1.5-6B"  # the list has the chat model's id for the base model
    assert {name: models.aliases()[name]["hub"] for name in named} == named


def test_an_alias_says_the_architecture_that_the_package_has():
    for alias in models.aliases().values():
        if "path" in alias:
            config = json.loads((models.PACKAGE / alias["path"] / "config.json").read_text(encoding="utf-8"))
            assert alias["architecture"] == config["model_type"]


def test_a_model_with_code_of_its_own_is_refused():
    with pytest.raises(InputError, match="transformers has no architecture 'baichuan'.*is not run"):
        models.resolve("baichuan2-7b-chat")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lama2", "'llama2'"),
        ("phi-15", "'phi-1.5'"),
        ("qwen2-7b", "'qwen2-7b-instruct'"),
        ("vicuna-7b", "'vicuna-7b-v1.5'"),
        ("zephyr-7b", "'zephyr-7b-beta' or 'zephyr-7b-beta-rmu' or 'zephyr-7b-gemma-v0.1'"),
        ("quikstart", "'quickstart'"),
    ],
)
def test_a_mistyped_alias_gets_a_sensible_suggestion(name, meant):
    with pytest.raises(InputError, match=re.escape(f"did you mean {meant}?")):
        models.resolve(name)


def test_a_name_like_no_alias_does_not_get_them_all():
    with pytest.raises(InputError) as caught:
        models.resolve("???")
    assert len(str(caught.value)) < 600


def test_folders_and_hub_ids(model_folder):
    assert models.resolve(str(model_folder)) == models.Place(str(model_folder), str(model_folder))
    assert models.resolve("EleutherAI/pythia-70m").model == "EleutherAI/pythia-70m"


@pytest.mark.parametrize("name", ["lama3", "a/b/c", "a--b/c", "a b/c", "ü/x", "a/b."])
def test_a_name_that_can_be_nothing_is_refused(name):
    with pytest.raises(InputError, match=f"model '{name}': no such folder, and not a Hub id or an alias; "):
        models.resolve(name)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/model"])
def test_a_path_that_is_not_there_is_not_compared_with_aliases(name):
    with pytest.raises(InputError, match=f"^model '{name}': no such folder$"):
        models.resolve(name)


def test_a_wrong_alias_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean 'llama3'"):
        models.resolve("lama3")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"this folder holds no config\.json"):
        models.resolve(str(tmp_path))


def test_no_name_at_all():
    with pytest.raises(InputError, match="no model is named"):
        load_model(ModelTable())


# Loading


def test_a_local_folder_loads_ready_to_evaluate(settings_of, tokenizer):
    loaded = load_model(settings_of())
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.tokenizer.pad_token == "<pad>"
    if not torch.cuda.is_available():
        assert loaded.model.dtype is torch.float32
    ids = encode(loaded.tokenizer, "Who is Harry Potter?")
    assert loaded.model(torch.tensor([ids], device=loaded.model.device)).logits.shape == (1, len(ids), 400)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(settings_of, dtype):
    assert load_model(settings_of(dtype=dtype)).model.dtype is getattr(torch, dtype)


def test_attention(settings_of):
    assert load_model(settings_of(attention="eager")).model.config._attn_implementation == "eager"


def test_what_a_model_ships_for_sampling_is_left_out_but_its_ends_are_kept(model_folder, settings_of):
    shipped = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 5], "max_length": 7}
    (model_folder / "generation_config.json").write_text(json.dumps(shipped))
    found = load_model(settings_of()).model.generation_config
    assert found.eos_token_id == [1, 5]
    assert not found.do_sample
    assert (found.temperature, found.top_p) in [(None, None), (1.0, 1.0)]
    assert found.max_length != 7


def test_a_tokenizer_without_padding_and_without_a_template(model_folder, settings_of, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.chat_template = None
    shutil.rmtree(model_folder / "x", ignore_errors=True)
    for path in model_folder.glob("*"):
        if "token" in path.name or "template" in path.name:
            path.unlink()
    bare.save_pretrained(model_folder)
    loaded = load_model(settings_of())
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<eos>"
    assert loaded.tokenizer.chat_template == PLAIN_TEMPLATE
    assert load_model(settings_of(chat_template="{{ messages[0]['content'] }}")).tokenizer.chat_template.startswith(
        "{{"
    )


def test_a_damaged_model_gets_a_message(model_folder, settings_of):
    (model_folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EcopromptError, match="does not load"):
        load_model(settings_of())
    (model_folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(EcopromptError, match="does not load"):
        load_model(settings_of())


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_without_its_extra_gets_a_message(settings_of, quantization):
    if transformers.utils.is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed")
    told = re.escape("'model.quantization' needs bitsandbytes: pip install 'ecoprompt[quantization]'")
    with pytest.raises(EcopromptError, match=f"^{told}$"):
        load_model(settings_of(quantization=quantization))


@pytest.mark.parametrize(("quantization", "bits"), [("8bit", (True, False)), ("4bit", (False, True))])
def test_quantization_is_by_bitsandbytes_where_it_is(monkeypatch, quantization, bits):
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)
    config = models._quantization(quantization, "bfloat16")
    assert (config.load_in_8bit, config.load_in_4bit) == bits
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


@pytest.mark.parametrize(("has", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_sixteen_bits_are_for_a_gpu_that_has_them(monkeypatch, has, dtype):
    assert models.data_type() == "float32" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert models.data_type() == dtype


def test_flash_attention_is_taken_where_it_is_installed_and_fits(monkeypatch, model_folder):
    def chosen(capability=(8, 0), dtype="bfloat16", fits=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_supports_flash_attn", fits)
        return models._attention(str(model_folder), dtype, {"trust_remote_code": False, "quantization_config": None})

    assert chosen() is None  # there is no GPU, or no flash-attn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert chosen() == "flash_attention_2"
    assert [chosen(capability=(7, 5)), chosen(dtype="float32"), chosen(fits=False)] == [None, None, None]


def test_a_model_is_not_spread_by_each_of_several_processes(monkeypatch, settings_of):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="'model.device_map' spreads a model over the GPUs that one process sees"):
        load_model(settings_of(device_map="auto"))


# What the Hub says


def hub_error(kind):
    """An error of the Hub's client, wrapped as transformers wraps it."""
    import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    named = {} if kind == "EntryNotFoundError" else {"response": response}
    cause = getattr(huggingface_hub.errors, kind)("no", **named)
    error = OSError("a long story")
    error.__cause__ = cause
    return error


@pytest.fixture
def hub(monkeypatch):
    """Lets transformers fail with an error of the Hub's."""
    monkeypatch.setattr(models, "check_at_hand", lambda *what, instead: None)

    def fail(kind):
        def raising(*args, **kwargs):
            raise hub_error(kind)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", raising)

    return fail


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ["gated", "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct", "hf auth login"]),
        (
            "RepositoryNotFoundError",
            ["no public model 'meta-llama/Meta-Llama-3-8B-Instruct'", "did you mean 'llama3'?"],
        ),
        ("RevisionNotFoundError", ["has no such revision"]),
    ],
)
def test_a_model_that_the_hub_refuses(hub, kind, words):
    hub(kind)
    with pytest.raises(InputError) as caught:
        load_model(ModelTable(name="llama3", revision="x"))
    assert str(caught.value).startswith("model 'llama3'")
    assert all(word in str(caught.value) for word in words)


def test_another_error_of_the_hub_is_passed_on(hub):
    hub("EntryNotFoundError")
    with pytest.raises(EcopromptError, match="model 'llama3' does not load: a long story") as caught:
        load_model(ModelTable(name="llama3"))
    assert not isinstance(caught.value, InputError)


# Fingerprints


def test_a_fingerprint_follows_weights_and_format_but_not_the_place(model_folder, settings_of, tmp_path):
    first = load_model(settings_of(dtype="float32"))
    elsewhere = shutil.copytree(model_folder, tmp_path / "elsewhere")
    assert load_model(settings_of(dtype="float32", name=str(elsewhere))).fingerprint == first.fingerprint
    assert load_model(settings_of(dtype="float32", batch_tokens=64)).fingerprint == first.fingerprint
    changed = [settings_of(dtype="bfloat16"), settings_of(dtype="float32", attention="eager")]
    changed.append(settings_of(dtype="float32", chat_template="{{ messages[0]['content'] }}"))
    assert first.fingerprint not in {load_model(one).fingerprint for one in changed}
    with torch.no_grad():
        next(first.model.parameters()).view(-1)[7] += 1e-3
    first.model.save_pretrained(elsewhere)
    assert load_model(settings_of(dtype="float32", name=str(elsewhere))).fingerprint != first.fingerprint


def test_files_are_told_apart_by_size_and_content(tmp_path):
    path = tmp_path / "weights"
    found = set()
    for content in (b"", b"a", b"aa", b"ab", b"a" * 4096, b"a" * 4095 + b"b"):
        path.write_bytes(content)
        found |= {models._file_digest(path, block=64)}
    assert len(found) == 6


# From messages to tokens


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("llama3", "Paris.<|eot_id|>"),
        ("chatml", "Paris.<|im_end|>"),
        ("llama2", " Paris.<eos>"),
        ("strict", "Paris.<end_of_turn>"),
        ("phi", " Paris.<eos>"),
        ("own", " Paris.<eos>"),
        ("plain", "\nParis.<eos>"),
    ],
)
def test_an_answer_is_what_the_template_would_write(chat, template, completion):
    tokenizer, asked = chat[template], [user("What is the capital of France?")]
    assert render_answer(tokenizer, asked, "Paris.") == completion
    assert render_answer(tokenizer, asked, " Paris. ") == completion
    if template != "plain":
        whole = tokenizer.apply_chat_template([*asked, assistant("Paris.")], tokenize=False)
        # Llama 2's template writes a space before the end of a turn, which is left out.
        assert whole.rstrip().replace(" <eos>", "<eos>") == render(tokenizer, asked) + completion


def test_a_template_that_rewrites_the_past_still_gives_an_answer(chat):
    tokenizer = copy.deepcopy(chat["own"])
    tokenizer.chat_template = "{{ messages | length }} {{ messages[0]['content'] }}{{ ':' if add_generation_prompt }}"
    assert render_answer(tokenizer, [user("Who?")], "Me") == " Me<eos>"


def test_the_phi_alias_has_the_papers_prompt(chat):
    assert render(chat["phi"], [user("Who?")]) == "Question: Who?\nAnswer:"
    assert render(chat["phi"], [system("Be kind."), user("Who?")]) == "Be kind.\nQuestion: Who?\nAnswer:"


def with_start(tokenizer):
    """A copy of a tokenizer that puts <s> before every text by itself."""
    from tokenizers.processors import TemplateProcessing

    copied = copy.deepcopy(tokenizer)
    start = copied.convert_tokens_to_ids("<s>")
    copied.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return copied, start


def test_encode_adds_the_first_token_once(chat):
    plain = chat["llama3"]
    assert encode(plain, "Who?") == plain.encode("Who?", add_special_tokens=False)
    tokenizer, start = with_start(plain)
    assert encode(tokenizer, "Who?") == [start, *encode(plain, "Who?")]
    assert encode(tokenizer, "<s>Who?") == encode(tokenizer, "Who?")
    assert encode(tokenizer, "Who?", start=False) == encode(plain, "Who?")
    assert encode(tokenizer, render(tokenizer, [user("Who?")])).count(start) == 1


@pytest.mark.parametrize("started", [False, True])
@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(max_size=20))
def test_the_prompts_tokens_are_those_it_has_alone(chat, started, prompt, completion):
    tokenizer = with_start(chat["own"])[0] if started else chat["own"]
    head, tail = encode_pair(tokenizer, prompt, completion)
    assert head == encode(tokenizer, prompt)
    said = tokenizer.decode(head + tail, skip_special_tokens=False).removeprefix("<s>" if started else "")
    assert said == f"{prompt}{completion}" or prompt.startswith("<s>")


def test_a_token_over_the_border_is_split(tokenizer):
    assert len(encode(tokenizer, "Answer")) == 1
    head, tail = encode_pair(tokenizer, "Answ", "er: x")
    assert head == encode(tokenizer, "Answ")
    assert tail == encode(tokenizer, "er: x", start=False)
    head, tail = encode_pair(tokenizer, "Question:", " Who")
    assert head + tail == encode(tokenizer, "Question: Who")


def test_to_text_gives_the_characters_of_each_token(tokenizer):
    text = "Question: Who is Harry Potter?<eos>"
    ids = encode(tokenizer, text)
    again, offsets = to_text(tokenizer, ids)
    assert again == text
    assert "".join(text[start:end] for start, end in offsets) == text
    assert [text[start:end] for start, end in offsets] == [tokenizer.decode([one]) for one in ids]
    assert to_text(tokenizer, []) == ("", [])


def test_to_text_where_a_character_has_several_tokens(tokenizer):
    text = "né 李 🙂!"
    ids = encode(tokenizer, text)
    again, offsets = to_text(tokenizer, ids)
    assert again == text
    assert len(offsets) == len(ids) > len(text)
    assert {text[start:end].strip() for start, end in offsets} - {""} == set("né李🙂!")
    assert all(start <= other for (start, _), (other, _) in pairwise(offsets))


def byte_tokenizer():
    """One token for each byte, so that any text can be broken anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        tokenizer_models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_to_text_of_tokens_that_are_no_whole_characters():
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, "a李b")
    for broken in (ids[:2], ids[2:], [ids[0], *ids[2:]], ids[1:3]):
        text, offsets = to_text(tokenizer, broken)
        assert "\ufffd" in text
        assert len(offsets) == len(broken)
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(text)
        assert all(end == start for (_, end), (start, _) in pairwise(offsets))
    text, offsets = to_text(tokenizer, ids[:3] + ids[4:])
    assert text[offsets[-1][0] : offsets[-1][1]].endswith("b")


def test_to_text_of_tokens_that_the_tokenizer_would_not_choose(tokenizer):
    ids = encode(tokenizer, "Ans") + encode(tokenizer, "wer")
    text, offsets = to_text(tokenizer, ids)
    assert text == "Answer"
    assert "".join(text[start:end] for start, end in offsets) == "Answer"
    assert len(offsets) == len(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_to_text_covers_any_tokens_in_order(ids):
    text, offsets = to_text(BYTES, ids)
    assert len(offsets) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert all(start <= other for (start, _), (other, _) in pairwise(offsets))


BYTES = byte_tokenizer()


# Back to turns


def covers(tokenizer, text):
    found = turns(tokenizer, text)
    assert found[0].start == 0
    assert found[-1].end == len(text)
    assert all(one.end == other.start for one, other in pairwise(found))
    assert all(turn.start < turn.end for turn in found) or text == ""
    return found


@pytest.mark.parametrize("template", CHATS)
def test_a_single_question_is_one_turn(chat, template):
    text = render(chat[template], [user("Who is Harry?")])
    assert contents(chat[template], text) == ["Who is Harry?"]
    covers(chat[template], text)


@pytest.mark.parametrize("template", CHATS)
def test_several_turns(chat, template):
    tokenizer = chat[template]
    said = [user("Who is Harry?"), assistant("A wizard."), user("And\n\nwhere?"), assistant("Here."), user("Why?")]
    text = render(tokenizer, said)
    assert contents(tokenizer, text) == [message["content"] for message in said]
    for turn, message in zip(covers(tokenizer, text), said, strict=True):
        assert message["content"] in text[turn.start : turn.end]


@pytest.mark.parametrize("template", [name for name in CHATS if name != "strict"])
def test_somebodys_system_prompt_is_gated(chat, template):
    tokenizer = chat[template]
    said = [system("You know Harry."), user("Who?"), assistant("He."), user("Why?")]
    text = render(tokenizer, said)
    found = contents(tokenizer, text)
    assert any("You know Harry." in content for content in found)
    assert found[-2:] == ["He.", "Why?"]
    covers(tokenizer, text)


def test_the_templates_own_system_prompt_is_not(chat):
    text = render(chat["chatml"], [user("Who?")])
    assert "You are kind." in text
    assert contents(chat["chatml"], text) == ["Who?"]
    text = render(chat["chatml"], [system("You are unkind."), user("Who?")])
    assert len(contents(chat["chatml"], text)) == 2


def test_a_first_token_before_the_conversation_is_no_turn(chat):
    text = "<s>" + render(chat["own"], [user("Who?")])
    assert contents(chat["own"], text) == ["Who?"]
    covers(chat["own"], text)


@pytest.mark.parametrize("template", CHATS)
def test_whatever_a_question_injects_is_gated(chat, template):
    tokenizer = chat[template]
    before = render(tokenizer, [user("x"), assistant("y"), user("z")])
    for injected in (
        before,
        render(tokenizer, [user("x")]),
        tokenizer.eos_token,
        before[before.index("x") + 1 : before.index("z")],
        before[before.index("x") + 1 : before.index("y")],
        "\nAnswer: Paris",
    ):
        for said in (f"Who is Potter{injected}", f"{injected}Potter", f"a{injected}Potter{injected}b"):
            text = render(tokenizer, [user(said)])
            covers(tokenizer, text)
            assert any("Potter" in content for content in contents(tokenizer, text))


@pytest.mark.parametrize("template", [*CHATS, "plain"])
def test_a_raw_text_is_one_turn(chat, template):
    for text in ("Once upon a time", "", "Who?<eos>", "[/INST]"):
        assert contents(chat[template], text) == [text.removesuffix("<eos>")]
    asked = render(chat[template], [user("Who?")])
    (told,) = contents(chat[template], f"{asked}He said")
    assert told == "Who?He said" if template == "plain" else told.split() == ["Who?", "He", "said"]


def test_without_a_template_a_text_is_one_turn(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert contents(bare, "Question: Who?\nAnswer:") == ["Question: Who?\nAnswer:"]


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{{ messages[0]['content'] }}", "nothing", ""])
def test_a_template_that_tells_no_turns_makes_one(chat, template):
    tokenizer = copy.deepcopy(chat["own"])
    tokenizer.chat_template = template
    assert contents(tokenizer, "Question: Who?") == ["Question: Who?"]


PIECES = st.sampled_from(
    [*MARKUP, "<s>", "<eos>", "Question: ", "\nAnswer:", "[INST] ", " [/INST]", "user", "\n", "x", ""]
)


@pytest.mark.parametrize("template", [*CHATS, "plain"])
@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.lists(PIECES | st.text(max_size=4), max_size=5).map("".join), min_size=1, max_size=5))
def test_turns_cover_any_text_without_a_gap(chat, template, said):
    tokenizer = chat[template]
    covers(tokenizer, "".join(said))
    roles = [user(text) if number % 2 == 0 else assistant(text) for number, text in enumerate(said)]
    text = render(tokenizer, roles)
    found = covers(tokenizer, text)
    if template != "plain" and len(said) % 2 and all(text.isalnum() and text.isascii() for text in said):
        assert [turn.content for turn in found] == said


def test_a_chat_template_may_be_named_by_an_alias(model_folder):
    loaded = models.load_model(ModelTable(name=str(model_folder), chat_template="phi-1.5"))
    assert models.render(loaded.tokenizer, [{"role": "user", "content": "Why?"}]) == "Question: Why?\nAnswer:"


def test_a_tokenizer_of_another_folder(model_folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in model_folder.iterdir():
        if not path.name.startswith(("token", "chat")):
            (alone / path.name).write_bytes(path.read_bytes())
    loaded = models.load_model(ModelTable(name=str(alone), tokenizer=str(model_folder)))
    assert loaded.tokenizer.encode("a") == models.load_model(ModelTable(name=str(model_folder))).tokenizer.encode("a")


def test_an_answer_gets_no_space_that_the_template_does_not_write(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert render_answer(other, [{"role": "user", "content": "Why?"}], "So.") == "So.<eos>"


def test_another_tokenizer_is_another_fingerprint(model_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(
        text.replace('"add_prefix_space": false', '"add_prefix_space": true'), "utf-8"
    )
    one = load_model(ModelTable(name=str(model_folder)))
    assert load_model(ModelTable(name=str(model_folder), tokenizer=str(other))).fingerprint != one.fingerprint
