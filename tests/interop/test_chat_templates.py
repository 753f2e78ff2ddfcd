"""A template's Jinja text, rendered as by transformers, writes and refuses what our renderer writes and refuses; an exported
folder names the template its model was trained with, and what ends its turns.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpt4o_jax import run
from gpt4o_jax.config import DataConfig
from gpt4o_jax.data import conversations
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.tokenizer_published import TEMPLATE_FILE, is_unknown
from gpt4o_jax.errors import RunError
from gpt4o_jax.interop import huggingface
from gpt4o_jax.interop.chat_templates import PUBLISHED_WITH_TOOLS, TEXTS
from gpt4o_jax.tasks import chat
from tests.data.test_tokenizer_published import FAMILIES

ROLES = {"bos": "<s>", "eos": "</s>"}


def spelled(rendered) -> str:
    return "".join(ROLES.get(i.name, i.name) if isinstance(i, chat.Symbol) else i.text for i, _ in rendered)


def transformers_environment(**trims) -> jinja2.Environment:
    """As in transformers.utils.chat_template_utils."""
    environment = ImmutableSandboxedEnvironment(**trims, extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    return environment


ENVIRONMENTS = [transformers_environment(trim_blocks=True, lstrip_blocks=True), transformers_environment()]
COMPILED = {name: [e.from_string(text) for e in ENVIRONMENTS] for name, text in TEXTS.items()}


def written(name: str, messages: list[dict], reply: bool, **more) -> str:
    """How transformers renders them, whichever white space around tags its environment keeps."""
    given = dict(messages=messages, tools=None, add_generation_prompt=reply, bos_token="<s>", eos_token="</s>") | more
    one, two = (compiled.render(given) for compiled in COMPILED[name])
    assert one == two
    return one


PARTS = (
    "a", " ", "\n", "\u3000", "ü日\U0001f600", '"', "{{ x }}", "<|im_end|>",
    "<think>", "</think>", "<tool_response>", "</tool_response>",
)  # fmt: skip
contents = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
any_order = st.lists(st.tuples(st.sampled_from(chat.ROLES), contents), min_size=1, max_size=7)


@st.composite
def alternating(draw):
    system = draw(st.lists(contents, max_size=1))
    turns = draw(st.lists(contents, min_size=1, max_size=6))
    return [("system", s) for s in system] + [(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]


def test_every_template_has_a_text():
    assert TEXTS.keys() == chat.TEMPLATES.keys()


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(turns=any_order | alternating(), reply=st.booleans())
def test_it_writes_what_our_renderer_writes(name, turns, reply):
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        wanted = spelled(chat.template(name).render(chat.read_messages(messages), reply))
    except RunError:
        with pytest.raises(jinja2.TemplateError, match="role"):
            written(name, messages, reply)
    else:
        assert written(name, messages, reply) == wanted


def test_qwen3_without_thoughts_is_asked_as_we_ask():
    asked, answer = {"role": "user", "content": "2+2?"}, chat.say("assistant", "4")
    rendered = chat.template("qwen3").render([chat.say("user", "2+2?")], True)
    wanted = spelled(rendered) + chat.template("qwen3").no_thoughts
    assert written("qwen3", [asked], True, enable_thinking=False) == wanted
    assert wanted + answer.text in written("qwen3", [asked, {"role": "assistant", "content": answer.text}], False)


@pytest.mark.parametrize("name", TEXTS)
def test_what_has_no_place_is_refused(name):
    for content in (None, [{"type": "text", "text": "a"}]):
        for role in ("system", "user", "assistant", "tool"):
            turns = [{"role": "user", "content": "a"}] * (role == "assistant") + [{"role": role, "content": content}]
            with pytest.raises((TypeError, jinja2.TemplateError)):
                written(name, [*turns, {"role": "user", "content": "b"}], True)
    theirs = "published with .* does" if name in PUBLISHED_WITH_TOOLS else "; put them"
    with pytest.raises(
        jinja2.TemplateError, match=rf"definitions of tools \(tools=\) are not written by template {name}.*{theirs}"
    ):
        written(name, [{"role": "user", "content": "a"}], True, tools=[{"name": "clock"}])
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    with pytest.raises(jinja2.TemplateError, match="tool_calls"):
        written(name, [{"role": "user", "content": "a"}, called], True)
    if name in ("own", "olmo2"):  # whose role names are symbols or part of the template
        with pytest.raises(jinja2.TemplateError, match="role developer, expected one of system, user"):
            written(name, [{"role": "developer", "content": "a"}], True)


# ---------------------------------------------------------------- exports


def published(folder):
    """A tokenizer.json with the symbols of every template."""
    reference, said = FAMILIES[0]()
    ends = ("user", "a"), ("assistant", "b"), ("user", "c")
    symbols = {
        part.name
        for template in chat.TEMPLATES.values()
        for part, _ in template.render([chat.say(*turn) for turn in ends], True)
        if isinstance(part, chat.Symbol)
    }
    reference.add_special_tokens(sorted(symbols - {"bos", "eos"}))
    folder.mkdir()
    reference.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said["tokenizer_config.json"]))
    return tokenizers.load(folder)


@pytest.mark.parametrize("ours_beside", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("name", TEXTS)
def test_the_template_is_known_again(tmp_path, name, ours_beside):
    """Even if transformers has saved the folder again, without our own file."""
    tokenizer = published(tmp_path / "first")
    assert tokenizer.template == ""
    files = huggingface.tokenizer_files(tokenizer, name)
    (tmp_path / "out").mkdir()
    for file, content in files.items():
        if ours_beside or file != "tokenizer.extra.json":
            (tmp_path / "out" / file).write_bytes(content)
    again = tokenizers.load(tmp_path / "out")
    assert again.template == name
    end = chat.symbol_id(chat.template(name).end, tokenizer)
    ids = json.loads(files["generation_config.json"])
    assert ids["eos_token_id"] == list(dict.fromkeys([*tokenizer.symbols.eos, end]))
    assert (ids["bos_token_id"], ids["pad_token_id"]) == (tokenizer.symbols.bos, tokenizer.symbols.pad)
    assert json.loads(huggingface.tokenizer_files(again, name)["generation_config.json"]) == ids
    if ours_beside:
        assert again.digest == tokenizer.digest


@pytest.fixture
def exported(hf, tmp_path, monkeypatch):
    """(data config, names of the folders) -> (the exported folder, the run that results from importing it again)."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    huggingface.import_folder(hf("llama-plain"), tmp_path / "run")

    def export(data: DataConfig, to: str = "out", workdir: str = "run"):
        opened = run.open_run(tmp_path / workdir)
        opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, data=data))
        with jax.set_mesh(opened.mesh):
            said = huggingface.export_folder(opened, tmp_path / to)
        huggingface.import_folder(tmp_path / to, tmp_path / f"{to}-run")
        again = run.open_run(tmp_path / f"{to}-run")
        assert said["template"] == conversations.trained_template(again.config.data, again.tokenizer)
        assert json.loads((tmp_path / to / "config.json").read_text())["eos_token_id"] == list(again.tokenizer.symbols.eos)
        return tmp_path / to, again

    return export


@pytest.mark.parametrize("template", ["", "plain"])
def test_a_run_of_conversations_says_its_template_and_its_ends(exported, template):
    data = DataConfig(source="world", path="qa", template=template)
    out, again = exported(data)
    name, ends = (template, [2]) if template else ("own", [2, tokenizers.byte_tokenizer().special("<|end_of_turn|>")])
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0
    }  # fmt: skip
    assert (out / TEMPLATE_FILE).read_text() == TEXTS[name] and again.tokenizer.template == name
    second, _ = exported(DataConfig(), "second", "out-run")  # exported just as imported
    assert {p.name: p.read_bytes() for p in second.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_run_of_texts_has_no_template(exported):
    out, again = exported(DataConfig())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert not (out / TEMPLATE_FILE).exists() and again.tokenizer.template == ""


THEIRS = {TEMPLATE_FILE: "{% generation %}\r\n{{ 'ü' }}", "additional_chat_templates/tool_use.jinja": "{{ tools }}\n"}


def with_templates(folder, files: dict[str, str]):
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(text.encode())


def templates_in(folder) -> dict[str, str]:
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in folder.rglob("*.jinja")}


@pytest.mark.parametrize("known", [False, True])
def test_a_template_that_a_model_came_with_goes_out_as_it_came(exported, tmp_path, known):
    """Whether known here or not: its text may say more than our renderer, such as how tools are declared."""
    theirs = THEIRS | ({TEMPLATE_FILE: "<<SYS>>{% if tools %}"} if known else {})
    with_templates(tmp_path / "run", theirs)
    for data in (DataConfig(), DataConfig(source="text", path="x")):  # as imported, or trained on texts
        out, again = exported(data, f"out-{data.source}")
        assert templates_in(out) == templates_in(again.workdir) == theirs
        assert again.tokenizer.template == ("llama2" if known else "") and is_unknown(again.tokenizer) != known
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.mark.parametrize("template", ["", "plain"])
def test_ours_takes_its_place_where_conversations_were_trained(exported, tmp_path, template):
    with_templates(tmp_path / "run", THEIRS)
    out, again = exported(DataConfig(source="world", path="qa", template=template))
    assert templates_in(out) == {TEMPLATE_FILE: TEXTS[template or "own"]}
    assert again.tokenizer.template == (template or "own")


def test_preferences_are_conversations_too(exported, tmp_path):
    with_templates(tmp_path / "run", THEIRS)
    opened = run.open_run(tmp_path / "run")
    objective = dataclasses.replace(opened.config.objective, method="dpo")
    opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, objective=objective))
    with jax.set_mesh(opened.mesh):
        assert huggingface.export_folder(opened, tmp_path / "out")["template"] == "own"
    assert templates_in(tmp_path / "out") == {TEMPLATE_FILE: TEXTS["own"]}


def test_who_imports_is_told_of_a_template_that_is_not_rendered(hf, tmp_path, capsys):
    source = hf("llama-plain")
    with_templates(source, THEIRS)
    huggingface.import_folder(source, tmp_path / "run")
    assert "chat template (chat_template.jinja) is not supported here: it is kept" in capsys.readouterr().err
    assert templates_in(tmp_path / "run") == THEIRS


def test_a_template_without_its_symbols_is_not_written(exported, tmp_path):
    """For a model imported with such a template: chat reports what is missing, and the weights can still be exported."""
    (tmp_path / "run" / TEMPLATE_FILE).write_text("{{ '<|im_start|>' }}")
    opened = run.open_run(tmp_path / "run")
    assert opened.tokenizer.template == "chatml"
    with jax.set_mesh(opened.mesh):
        said = huggingface.export_folder(opened, tmp_path / "out")
    assert said["template"] == ""
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]
