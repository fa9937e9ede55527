"""Whatever form and file a dialogue comes in, the model learns the answers that are to be learnt, and nothing else."""

import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.data_section import DataConfig
from engine.config.trial import ModelConfig
from engine.data.views import load_data
from engine.model.inspect import load_tokenizer

TEXT = st.text("abc é\n\"'{}[]:,データ", min_size=1, max_size=12).filter(str.strip)
TURN = st.tuples(TEXT, TEXT, st.booleans())
DIALOGUE = st.tuples(st.none() | TEXT, st.lists(TURN, min_size=1, max_size=3).map(lambda t: [*t[:-1], (*t[-1][:2], True)]))
NUMBER = itertools.count()


def plain(system, turns, keys=("role", "content"), names=("system", "user", "assistant"), marks=lambda learned: {}):
    role, content = keys
    head = [] if system is None else [{role: names[0], content: system}]
    pairs = (({role: names[1], content: q}, {role: names[2], content: a, **marks(yes)}) for q, a, yes in turns)
    return [*head, *itertools.chain.from_iterable(pairs)]


def messages(system, turns):
    return {"messages": plain(system, turns, marks=lambda yes: {"weight": int(yes)})}


def masks(system, turns):
    mask = [0] * (system is not None) + [x for *_, yes in turns for x in (0, int(yes))]
    return {"messages": plain(system, turns), "loss_mask": mask}


def parts(system, turns):
    rows = plain(system, turns, marks=lambda yes: {"train": yes})
    return {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in rows]}


def sharegpt(system, turns):
    rows = plain(None, turns, ("from", "value"), ("", "human", "gpt"), lambda yes: {"masked": not yes})
    return {"conversations": rows, "system": system or ""}


def as_text(system, turns):
    return {"messages": json.dumps(messages(system, turns)["messages"])}


def split_at_the_end(system, turns):
    rows = plain(system, turns)
    return {"prompt": rows[:-1], "completion": rows[-1:]}


def alpaca(system, turns):
    *before, (question, answer, _) = turns
    return {"system": system or "", "history": [[q, a] for q, a, _ in before], "instruction": question, "output": answer}


def all_turns(turns):
    return [a for _, a, _ in turns]


def marked(turns):
    return [a for _, a, yes in turns if yes]


FORMS = {  # form -> the answers that it says are to be learnt
    messages: marked, masks: marked, parts: marked, sharegpt: marked, as_text: marked,
    split_at_the_end: lambda turns: [turns[-1][1]], alpaca: all_turns,
}  # fmt: skip


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8-sig")


def gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in rows).encode()))


def table(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


FILES = {".jsonl": jsonl, ".jsonl.gz": gz, ".parquet": table, ".json": lambda path, rows: path.write_text(json.dumps(rows))}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(ModelConfig(path=str(tiny_model_dir)))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DIALOGUE, min_size=1, max_size=4), st.sampled_from(list(FORMS)), st.sampled_from(list(FILES)), st.booleans())
def test_what_is_trained_is_what_the_data_say(tmp_path, tokenizer, dialogues, form, ending, renamed):
    path = tmp_path / f"{next(NUMBER)}{ending}"
    rows = [form(*dialogue) for dialogue in dialogues]
    columns = {}
    if renamed:
        column = next(iter(rows[0])).replace("conversations", "messages")
        columns = {column: "mine"}
        rows = [{"mine" if i == 0 else name: value for i, (name, value) in enumerate(row.items())} for row in rows]
    FILES[ending](path, rows)
    config = DataConfig(train=str(path), eval="train", max_seq_length=2048, eval_max_seq_length=2048, columns=columns)
    view, _ = load_data(config, tokenizer)
    learnt = [tokenizer.decode(view[i].input_ids[view[i].is_target]) for i in range(len(view))]
    assert learnt == ["".join(f"{a}<|end|>" for a in FORMS[form](turns)) for _, turns in dialogues]
    for i, (system, turns) in enumerate(dialogues):
        whole = tokenizer.decode(view[i].input_ids)
        assert all(text in whole for q, a, _ in turns for text in (q, a)) and (system or "") in whole
