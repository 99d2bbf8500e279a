"""enrich_dataset from end to end."""

from __future__ import annotations

import itertools
import sqlite3
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, expected, make_texts

import enrich_dataset as module

pytestmark = pytest.mark.every_form


def test_every_cell_is_what_the_server_answered(bench: Bench) -> None:
    bench.write(make_texts(95)).enrich()
    bench.check()
    assert len(bench.server.calls) == 10
    assert sorted(bench.asked) == sorted(bench.texts)


@pytest.mark.one_form
def test_the_frame_is_what_pandas_reads_plus_nullable_labels(bench: Bench) -> None:
    bench.write([*make_texts(20), " "])
    frame = bench.enrich()
    assert frame[["id", "text"]].equals(pd.read_csv(bench.input))
    assert [str(frame[label].dtype) for label in LABELS] == ["Int8"] * 3
    assert frame[LABELS].head(20).astype(str).to_numpy().tolist() == expected(bench.texts[:20])
    assert frame[LABELS].iloc[20].isna().all()
    assert frame.attrs["enrichment"]["labelled_rows"] == 20
    assert frame.attrs["enrichment"]["blank_rows"] == {}
    assert frame.attrs["enrichment"]["calls"] == 2


def test_a_second_run_makes_no_call(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich()
    before = bench.output.read_bytes()
    bench.output.unlink()
    bench.enrich()
    assert len(bench.server.calls) == 3
    assert bench.output.read_bytes() == before


def test_a_second_run_needs_no_key(bench: Bench) -> None:
    bench.write(make_texts(3)).enrich()
    with sqlite3.connect(bench.store) as db:  # as if OpenAI had answered, whose server is the one that wants a key
        db.execute("UPDATE questions SET server = 'api.openai.com/v1'")
    db.close()
    bench.enrich(base_url=None)
    bench.check()


def test_equal_rows_are_asked_once(bench: Bench) -> None:
    bench.write(["an attack", "cake"] * 10).enrich()
    assert sorted(bench.asked) == ["an attack", "cake"]
    bench.check()


def test_rows_with_another_existing_label_are_other_rows(bench: Bench) -> None:
    bench.input.write_text("text,label\nattack,a\nattack,b\nattack,a\n")
    module.enrich_dataset(
        bench.input, bench.output, "text", "label", LABELS, base_url=bench.server.url, quiet=True, batch_size=1
    )
    sent = [call.body["messages"][1]["content"] for call in bench.server.calls]
    assert sorted(sent) == ['{"660":["attack","a"]}', '{"660":["attack","b"]}']


def test_added_rows_cost_only_themselves(bench: Bench) -> None:
    texts = make_texts(40)
    bench.write(texts[:30]).enrich()
    bench.write([*texts[30:], *reversed(texts[:30])]).enrich()
    assert sorted(bench.asked[30:]) == sorted(texts[30:])
    bench.check()


@pytest.mark.one_form
def test_one_more_label_asks_only_for_that_label(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:2])
    bench.enrich(LABELS)
    assert [call.labels for call in bench.server.calls] == [tuple(LABELS[:2]), tuple(LABELS[2:])]
    bench.check()


@pytest.mark.one_form
def test_the_labels_that_are_asked_are_said_when_others_are_known(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:2])
    bench.enrich(quiet=False)
    assert "Labels to send (the others are known): ['sexual_harassment']\n" in capsys.readouterr().out


@pytest.mark.one_form
def test_fewer_or_reordered_labels_ask_nothing(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    frame = bench.enrich([LABELS[2], LABELS[0]])
    assert len(bench.server.calls) == 1
    right = [[row[2], row[0]] for row in expected(bench.texts)]
    assert frame[[LABELS[2], LABELS[0]]].astype(str).to_numpy().tolist() == right


def test_another_model_asks_anew(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    bench.enrich(model="gpt-4.1")
    assert [call.body["model"] for call in bench.server.calls] == ["gpt-4o-mini", "gpt-4.1"]


@pytest.mark.one_form
def test_fresh_asks_again_and_the_newest_answer_stands(bench: Bench) -> None:
    bench.write(["cake"] * 3).enrich()
    answer = '{"660": ["personal_attacks"]}'
    completion = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    bench.server.script.append((200, {}, completion))
    bench.enrich(fresh=True)
    assert bench.cells == [["0", "1", "0"]] * 3
    bench.enrich()
    assert bench.cells == [["0", "1", "0"]] * 3
    assert len(bench.server.calls) == 2


def test_start_index_and_limit_send_only_their_window(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich(start_index=10, limit=5)
    assert sorted(bench.asked) == sorted(bench.texts[10:15])
    bench.check(blank_rows=[*range(10), *range(15, 30)])


def test_rows_outside_the_window_keep_what_the_store_has(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich(limit=10)
    bench.enrich(start_index=20)
    bench.check(blank_rows=range(10, 20))


def test_blank_texts_are_not_sent_and_stay_blank(bench: Bench) -> None:
    bench.write(["", "  \t", "cake"]).enrich()
    assert bench.asked == ["cake"]
    bench.check(blank_rows=[0, 1])


@pytest.mark.one_form
def test_a_label_column_of_the_input_keeps_its_cells_and_only_blanks_are_asked(bench: Bench) -> None:
    bench.input.write_text(
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",,2\nthree attacks,"",3\ncake,1,4\ntram, ,5\n'
    )
    frame = bench.enrich(["personal_attacks"])
    assert sorted(bench.asked) == ["three attacks", "tram", "two\nattacks"]
    assert bench.output.read_text() == (
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",1,2\nthree attacks,"1",3\ncake,1,4\ntram,0,5\n'
    )
    assert frame["personal_attacks"].tolist() == [0, 1, 1, 1, 0]
    assert list(frame.columns) == ["text", "personal_attacks", "id"]


def test_equal_rows_of_which_some_have_cells_are_asked_once_for_all_that_is_lacking(bench: Bench) -> None:
    labels = LABELS[:2]
    bench.input.write_text("text,praising_violence,personal_attacks\nattack,1,\nattack,,0\nattack,1,1\n")
    bench.enrich(labels)
    assert [call.texts for call in bench.server.calls] == [("attack",)]
    assert bench.output.read_text() == "text,praising_violence,personal_attacks\nattack,1,1\nattack,0,0\nattack,1,1\n"


@pytest.mark.one_form
def test_the_output_may_be_the_next_input(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:1])
    bench.output.rename(bench.input)
    bench.enrich()
    bench.check()
    assert [len(call.labels) for call in bench.server.calls] == [1, 2]


def test_a_header_alone_comes_back_with_its_new_names(bench: Bench) -> None:
    bench.write([]).enrich()
    assert bench.output.read_text() == "id,text,praising_violence,personal_attacks,sexual_harassment\n"
    assert bench.server.calls == []


def test_workers_call_at_the_same_time(bench: Bench) -> None:
    bench.server.model.first_token = 0.2
    bench.write(make_texts(40)).enrich(batch_size=5, max_workers=4)
    assert bench.server.most_in_flight == 4
    bench.check()


def test_one_worker_makes_one_call_at_a_time(bench: Bench) -> None:
    bench.write(make_texts(40)).enrich(batch_size=5, max_workers=1)
    calls = sorted(bench.server.calls, key=lambda call: call.at)
    assert all(one.ended <= next_one.at for one, next_one in itertools.pairwise(calls))
    bench.check()


def test_the_csv_is_written_while_the_run_goes_on(bench: Bench) -> None:
    bench.timing = module.Timing(between_saves=0.0)
    bench.server.model.first_token = 0.02
    seen = []
    bench.server.on_call = lambda number, body: seen.append(bench.output.exists())
    bench.write(make_texts(60)).enrich(max_workers=1)
    assert not seen[0]
    assert seen[-1]


@pytest.mark.one_form
def test_a_csv_that_cannot_be_written_meanwhile_does_not_end_the_job(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.timing = module.Timing(between_saves=0.0)
    bench.server.model.first_token = 0.04

    def block_and_free(number: int, body: Any) -> None:
        if number == 1:
            bench.output.unlink(missing_ok=True)
            bench.output.mkdir()
        if number == 25 and bench.output.is_dir():
            bench.output.rmdir()

    bench.server.on_call = block_and_free
    bench.write(make_texts(300)).enrich(max_workers=1, quiet=False)
    assert "Not saved yet: " in capsys.readouterr().err
    bench.check()


def test_a_run_in_another_thread_works(bench: Bench) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bench.write(make_texts(10))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bench.enrich).result()
    bench.check()


def test_the_sample_takes_four_calls_and_a_quarter_of_a_dense_answers_tokens(bench: Bench) -> None:
    import example_usage

    module.enrich_dataset(
        ROOT / "HatefulData.csv",
        bench.output,
        "text",
        "label",
        example_usage.LABELS,
        base_url=bench.server.url,
        quiet=True,
    )
    dense = '"100":{' + ",".join(f'"{label}":0' for label in example_usage.LABELS) + "}"
    assert len(bench.server.calls) == 4
    spent = sum(call.completion_tokens for call in bench.server.calls)
    assert spent <= 37 * len(dense) / 4 / 4
