"""The Hub: where it is out of reach, it is asked once, and what is missing is named with how to get it."""

import socket
import urllib.request

import huggingface_hub
import pytest

from ecoprompt import hub
from ecoprompt.data import Source, load_rows
from ecoprompt.hub import fetch, out_of_reach
from ecoprompt.models import load_model
from ecoprompt.recipe import ModelTable
from ecoprompt.registry import EcopromptError, InputError
from ecoprompt.tokens import ner


@pytest.fixture(params=["HF_HUB_OFFLINE is set", "tests may not use the network"])
def reason(request, monkeypatch, tmp_path):
    """Why the Hub is out of reach; one that is unknown is found out once, by one attempt to connect."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("tests may not use the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param.startswith("HF_HUB"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "once", True)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    yield request.param
    assert len(asked) == (request.param != "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("what", "needs"),
    [
        ("model 'nobody/nothing'", lambda: load_model(ModelTable(name="nobody/nothing"))),
        ("the pack 'nobody/nothing'", lambda: fetch("the pack 'nobody/nothing'", "nobody/nothing", ["a"], "a")),
        ("the token classifier 'nobody/nothing'", lambda: ner("text", model="nobody/nothing")),
    ],
)
def test_what_is_out_of_reach_gets_one_message_at_once(reason, what, needs, caplog):
    for _ in range(2):
        with pytest.raises(EcopromptError) as caught:
            needs()
    told = str(caught.value)
    assert told.startswith(f"{what} is not here and the Hub cannot be reached ({reason}); download it")
    assert "(`hf download nobody/nothing`)" in told
    assert "HF_HUB_OFFLINE=1" in told
    assert "or name a folder" in told
    assert caught.value.exit_status == 1
    assert not caplog.records


def test_data_out_of_reach_gets_one_message_at_once(reason, caplog):
    with pytest.raises(EcopromptError, match=f"neither here nor could it be had from the Hub \\({reason}"):
        load_rows(Source("nobody/nothing"))
    assert not caplog.records


def test_a_hub_that_answers_is_in_reach(monkeypatch):
    asked = []

    class Connection:
        def close(self):
            asked.append("closed")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://mirror.lab")
    monkeypatch.setattr(socket, "create_connection", lambda place, patience: asked.append(place) or Connection())
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    assert out_of_reach() is None
    assert asked == [("mirror.lab", 80), "closed"]


def test_a_name_that_cannot_be_on_the_hub_is_not_looked_for():
    with pytest.raises(InputError, match="no such folder, and not a Hub id"):
        fetch("the pack '../x'", "../x", ["a"], "a")


def test_a_hub_behind_a_proxy_is_not_tried(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", lambda *args: pytest.fail("went past the proxy"))
    for name in ("https", "all"):
        monkeypatch.setattr(urllib.request, "getproxies", lambda name=name: {name: "http://proxy.lab"})
        assert out_of_reach() is None


def test_a_program_that_uses_the_library_stays_online(monkeypatch):
    def refuse(*args):
        raise OSError("for a moment")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert out_of_reach() == "for a moment"
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
