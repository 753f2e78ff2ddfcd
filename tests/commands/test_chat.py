"""chat: the model gets the whole conversation, replies are streamed and kept, and only /exit ends the session."""

import io
import json

import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.sampling import chat as session_lib

ARGS = ("--temperature=0", "--max_new_tokens=4")
OWN = (*ARGS, "--template=own")  # one symbol begins a turn and one ends it
SHORT = ("--temperature=0", "--max_new_tokens=1", "--template=own")  # room for two turns of one letter


@pytest.fixture
def talk(run, capsys, monkeypatch):
    """(replies on stdout, messages on stderr, the final JSON) of a piped conversation."""

    def call(*lines, more=ARGS):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", f"--workdir={run}", *more]) == 0
        out, err = capsys.readouterr()
        replies, result = out.rstrip("\n").rpartition("\n")[::2]
        return replies, err, json.loads(result)

    return call


def test_a_model_without_chat_training_continues_plain_text(run, talk, command):
    replies, told, result = talk("1 gr")
    wanted = command("generate", f"--workdir={run}", "--prompt=1 gr", *ARGS)[0]["samples"][0]
    assert told.startswith("this model was not trained to chat") and result["template"] == "none"
    assert replies == wanted["text"]
    assert result["messages"] == [{"role": "user", "content": "1 gr"}, {"role": "assistant", "content": wanted["text"]}]
    assert (result["replies"], result["tokens"]) == (1, wanted["tokens"])


def test_history_is_what_the_model_sees_until_reset(talk):
    first, again = talk("1 g", "/reset", "1 g")[0], talk("1 g")[0]
    assert first == f"{again}\n{again}", "a reply depends on what was said before, and greedy on nothing else"
    _, _, result = talk("1 g", "/reset", "2", "/exit", "never read")
    assert [m["content"] for m in result["messages"] if m["role"] == "user"] == ["2"] and result["replies"] == 2


def test_the_oldest_turns_go_when_the_context_is_full(talk):
    """Of 16 positions, 4 are for the reply: two questions of five letters no longer fit."""
    _, told, result = talk("1 gre", "2 gre", "3 gre", more=OWN)
    assert told.count("the context is full: the oldest 2 turns were dropped") == len(told.splitlines()) - 1 > 0
    assert [m["content"] for m in result["messages"]][-2] == "3 gre" and len(result["messages"]) < 6
    _, told, result = talk("1 green bottles", "1 g", more=OWN)
    assert "this message and the system text are 20 tokens, but the context holds 16" in told and result["replies"] == 1


def test_the_system_text_stays_when_turns_go(talk, monkeypatch):
    seen = []
    real = session_lib.generate
    spy = lambda model, params, rows, *a, **k: (seen.append(rows[0]), real(model, params, rows, *a, **k))[1]
    monkeypatch.setattr(session_lib, "generate", spy)
    talk("/system 7", "1", "2", "3", "/system", "4", more=OWN)
    system = [4, *seen[0][2:4], 8]
    assert all(ids[:5] == [1, *system] for ids in seen[:3]) and 4 not in seen[3]
    assert all(ids[-1] == 6 and len(ids) <= 12 for ids in seen)


def test_settings_hold_from_then_on(talk):
    _, told, result = talk("/set temperature=0.5 top_k=3 seed=7", "/set max_new_tokens=1", "1 g")
    assert "max_new_tokens=1 temperature=0.5 top_k=3" in told and "seed=7" in told and result["tokens"] <= 1
    other = talk("/set temperature=5 seed=1", "1 g")[2]["messages"]
    assert other == talk("/set temperature=5 seed=1", "1 g")[2]["messages"]
    assert any(other != talk(f"/set temperature=5 seed={s}", "1 g")[2]["messages"] for s in (2, 3, 4))


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("/rest", "unknown command /rest (did you mean reset?)"),
        ("/set temprature=1", "no setting 'temprature' (did you mean temperature?); /set alone shows them"),
        ("/set temperature=hot", "expected a number"),
        ("/set top_p=2", "from 0.0 to 1.0"),
        ("/set top_k", "needs a value"),
        ("/set max_new_tokens=9 foo=1", "no setting 'foo'"),
        ("/set max_new_tokens=9 top_p=2", "from 0.0 to 1.0"),
        ("/system 1 green bottles and 1 red", "the system text is "),
        ("/system Ω", "character 'Ω'"),
        ("/help", "//TEXT says /TEXT"),
        ("Ω", "character 'Ω'"),
        ("//1", "character '/'"),
    ],
)
def test_what_cannot_be_done_is_told_and_the_session_goes_on(talk, line, fragment):
    _, told, result = talk("1", line, "2", more=SHORT)
    assert fragment in told
    assert [m["content"] for m in result["messages"]][0::2] == ["1", "2"]
    assert result["tokens"] == 2, "SHORT holds still: a mistake changes nothing"


def test_a_number_of_tokens_beyond_int32_does_not_end_the_session(talk):
    assert talk("/set max_new_tokens=9999999999 top_k=9999999999", "1")[2]["replies"] == 1


def test_a_message_that_cannot_be_answered_is_not_kept(talk, monkeypatch):
    real, calls = session_lib.generate, []

    def refusing(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            raise session_lib.RunError("not this one")
        return real(*args, **how)

    monkeypatch.setattr(session_lib, "generate", refusing)
    _, told, result = talk("1", "2", "3", more=SHORT)
    assert "not this one" in told and [m["content"] for m in result["messages"]][0::2] == ["1", "3"]


@pytest.mark.parametrize(
    ("code", "fragment", "flag"),
    [
        (ExitCode.USAGE, "stop_ids token 999 does not exist", "--stop_ids=999"),
        (ExitCode.USAGE, "logit_bias token 999 does not exist", "--logit_bias=999:1"),
        (ExitCode.DATA, "character 'Ω'", "--system=Ω"),
        (ExitCode.USAGE, "the system text is ", "--system=1 green bottles and 1 red"),
    ],
)
def test_what_no_message_could_be_answered_with_is_refused_at_once(run, refused, monkeypatch, code, fragment, flag):
    monkeypatch.setattr("sys.stdin", io.StringIO("never read\n"))
    refused(code, fragment, "chat", f"--workdir={run}", *SHORT, flag)


def test_a_line_that_is_not_utf8_is_told_and_the_session_goes_on(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1\n2\xfc\n3\n"), encoding="utf-8"))
    assert main(["chat", f"--workdir={run}", *SHORT]) == 0
    out, told = capsys.readouterr()
    assert "not UTF-8 (byte 0xfc in" in told
    said = json.loads(out.splitlines()[-1])["messages"]
    assert [m["content"] for m in said if m["role"] == "user"] == ["1", "3"]


def test_an_interrupted_reply_is_kept_as_far_as_it_came(talk, monkeypatch):
    real, calls = session_lib.generate, []

    def interrupted(*args, on_tokens, **how):
        calls.append(1)
        if len(calls) > 1:
            return real(*args, on_tokens=on_tokens, **how)
        on_tokens(0, [40])
        raise KeyboardInterrupt

    monkeypatch.setattr(session_lib, "generate", interrupted)
    _, told, result = talk("1", "2", more=SHORT)
    assert "stopped" in told and result["replies"] == 2
    assert [len(m["content"]) for m in result["messages"]][1] == 1


def test_templates_that_do_not_fit_are_refused_at_once(run, refused):
    told = refused(
        ExitCode.DATA, "template chatml writes <|im_start|>, <|im_end|>,", "chat", f"--workdir={run}", "--template=chatml"
    )
    assert "take --template=own or llama2 or mistral or mistral0.2 or olmo2 or plain, or a model trained or imported with" in told
    refused(ExitCode.USAGE, "did you mean plain?", "chat", f"--workdir={run}", "--template=plane")
