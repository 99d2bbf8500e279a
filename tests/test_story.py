"""enrich_dataset from end to end."""

from __future__ import annotations

import itertools
import sqlite3

import pandas as pd
import pytest
from conftest import LABELS, ROOT, Job, expected, make_texts

import enrich_dataset as module

pytestmark = pytest.mark.every_form


def test_every_cell_is_what_the_server_answered(job: Job) -> None:
    job.write(make_texts(95)).enrich()
    job.check()
    assert len(job.server.calls) == 10
    assert sorted(job.asked) == sorted(job.texts)


@pytest.mark.one_form
def test_the_frame_is_what_pandas_reads_plus_nullable_labels(job: Job) -> None:
    job.write([*make_texts(20), " "])
    frame = job.enrich()
    assert frame[["id", "text"]].equals(pd.read_csv(job.input))
    assert [str(frame[label].dtype) for label in LABELS] == ["Int8"] * 3
    assert frame[LABELS].head(20).astype(str).to_numpy().tolist() == expected(job.texts[:20])
    assert frame[LABELS].iloc[20].isna().all()
    assert frame.attrs["enrichment"]["labelled_rows"] == 20
    assert frame.attrs["enrichment"]["blank_rows"] == {}
    assert frame.attrs["enrichment"]["calls"] == 2


def test_a_second_run_makes_no_call(job: Job) -> None:
    job.write(make_texts(30)).enrich()
    before = job.output.read_bytes()
    job.output.unlink()
    job.enrich()
    assert len(job.server.calls) == 3
    assert job.output.read_bytes() == before


def test_a_second_run_needs_no_key(job: Job) -> None:
    job.write(make_texts(3)).enrich()
    with sqlite3.connect(job.store) as db:  # as if OpenAI had answered, whose server is the one that wants a key
        db.execute("UPDATE questions SET server = 'api.openai.com/v1'")
    db.close()
    job.enrich(base_url=None)
    job.check()


def test_equal_rows_are_asked_once(job: Job) -> None:
    job.write(["an attack", "cake"] * 10).enrich()
    assert sorted(job.asked) == ["an attack", "cake"]
    job.check()


def test_rows_with_another_existing_label_are_other_rows(job: Job) -> None:
    job.input.write_text("text,label\nattack,a\nattack,b\nattack,a\n")
    module.enrich_dataset(
        job.input, job.output, "text", "label", LABELS, base_url=job.server.url, quiet=True, batch_size=1
    )
    sent = [call.body["messages"][1]["content"] for call in job.server.calls]
    assert sorted(sent) == ['{"660":["attack","a"]}', '{"660":["attack","b"]}']


def test_added_rows_cost_only_themselves(job: Job) -> None:
    texts = make_texts(40)
    job.write(texts[:30]).enrich()
    job.write([*texts[30:], *reversed(texts[:30])]).enrich()
    assert sorted(job.asked[30:]) == sorted(texts[30:])
    job.check()


@pytest.mark.one_form
def test_one_more_label_asks_only_for_that_label(job: Job) -> None:
    job.write(make_texts(10)).enrich(LABELS[:2])
    job.enrich(LABELS)
    assert [call.labels for call in job.server.calls] == [tuple(LABELS[:2]), tuple(LABELS[2:])]
    job.check()


@pytest.mark.one_form
def test_the_labels_that_are_asked_are_said_when_others_are_known(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(make_texts(10)).enrich(LABELS[:2])
    job.enrich(quiet=False)
    assert "Labels to send (the others are known): ['sexual_harassment']\n" in capsys.readouterr().out


@pytest.mark.one_form
def test_fewer_or_reordered_labels_ask_nothing(job: Job) -> None:
    job.write(make_texts(10)).enrich()
    frame = job.enrich([LABELS[2], LABELS[0]])
    assert len(job.server.calls) == 1
    right = [[row[2], row[0]] for row in expected(job.texts)]
    assert frame[[LABELS[2], LABELS[0]]].astype(str).to_numpy().tolist() == right


def test_another_model_asks_anew(job: Job) -> None:
    job.write(make_texts(10)).enrich()
    job.enrich(model="gpt-4.1")
    assert [call.body["model"] for call in job.server.calls] == ["gpt-4o-mini", "gpt-4.1"]


@pytest.mark.one_form
def test_fresh_asks_again_and_the_newest_answer_stands(job: Job) -> None:
    job.write(["cake"] * 3).enrich()
    answer = '{"660": ["personal_attacks"]}'
    completion = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    job.server.script.append((200, {}, completion))
    job.enrich(fresh=True)
    assert job.cells == [["0", "1", "0"]] * 3
    job.enrich()
    assert job.cells == [["0", "1", "0"]] * 3
    assert len(job.server.calls) == 2


def test_start_index_and_limit_send_only_their_window(job: Job) -> None:
    job.write(make_texts(30)).enrich(start_index=10, limit=5)
    assert sorted(job.asked) == sorted(job.texts[10:15])
    job.check(blank_rows=[*range(10), *range(15, 30)])


def test_rows_outside_the_window_keep_what_the_store_has(job: Job) -> None:
    job.write(make_texts(30)).enrich(limit=10)
    job.enrich(start_index=20)
    job.check(blank_rows=range(10, 20))


def test_blank_texts_are_not_sent_and_stay_blank(job: Job) -> None:
    job.write(["", "  \t", "cake"]).enrich()
    assert job.asked == ["cake"]
    job.check(blank_rows=[0, 1])


@pytest.mark.one_form
def test_a_label_column_of_the_input_keeps_its_cells_and_only_blanks_are_asked(job: Job) -> None:
    job.input.write_text(
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",,2\nthree attacks,"",3\ncake,1,4\ntram, ,5\n'
    )
    frame = job.enrich(["personal_attacks"])
    assert sorted(job.asked) == ["three attacks", "tram", "two\nattacks"]
    assert job.output.read_text() == (
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",1,2\nthree attacks,"1",3\ncake,1,4\ntram,0,5\n'
    )
    assert frame["personal_attacks"].tolist() == [0, 1, 1, 1, 0]
    assert list(frame.columns) == ["text", "personal_attacks", "id"]


def test_equal_rows_of_which_some_have_cells_are_asked_once_for_all_that_is_lacking(job: Job) -> None:
    labels = LABELS[:2]
    job.input.write_text("text,praising_violence,personal_attacks\nattack,1,\nattack,,0\nattack,1,1\n")
    job.enrich(labels)
    assert [call.texts for call in job.server.calls] == [("attack",)]
    assert job.output.read_text() == "text,praising_violence,personal_attacks\nattack,1,1\nattack,0,0\nattack,1,1\n"


@pytest.mark.one_form
def test_the_output_may_be_the_next_input(job: Job) -> None:
    job.write(make_texts(10)).enrich(LABELS[:1])
    job.output.rename(job.input)
    job.enrich()
    job.check()
    assert [len(call.labels) for call in job.server.calls] == [1, 2]


def test_a_header_alone_comes_back_with_its_new_names(job: Job) -> None:
    job.write([]).enrich()
    assert job.output.read_text() == "id,text,praising_violence,personal_attacks,sexual_harassment\n"
    assert job.server.calls == []


def test_workers_call_at_the_same_time(job: Job) -> None:
    job.server.first_token = 0.2
    job.write(make_texts(40)).enrich(batch_size=5, max_workers=4)
    assert job.server.most_in_flight == 4
    job.check()


def test_one_worker_makes_one_call_at_a_time(job: Job) -> None:
    job.write(make_texts(40)).enrich(batch_size=5, max_workers=1)
    calls = sorted(job.server.calls, key=lambda call: call.at)
    assert all(one.ended <= next_one.at for one, next_one in itertools.pairwise(calls))
    job.check()


def test_the_csv_is_written_while_the_job_runs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    job.server.first_token = 0.02
    seen = []
    job.server.admit = lambda _: seen.append(job.output.exists()) or ({}, "")  # type: ignore[method-assign]
    job.write(make_texts(60)).enrich(max_workers=1)
    assert not seen[0]
    assert seen[-1]


@pytest.mark.one_form
def test_a_csv_that_cannot_be_written_meanwhile_does_not_end_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    job.server.first_token = 0.04
    admit = job.server.admit

    def block_and_free(tokens: int) -> tuple[dict[str, str], str]:
        if len(job.server.calls) == 1:
            job.output.unlink(missing_ok=True)
            job.output.mkdir()
        if len(job.server.calls) == 25 and job.output.is_dir():
            job.output.rmdir()
        return admit(tokens)

    job.server.admit = block_and_free  # type: ignore[method-assign]
    job.write(make_texts(300)).enrich(max_workers=1, quiet=False)
    assert "Not saved yet: " in capsys.readouterr().err
    job.check()


def test_a_run_in_another_thread_works(job: Job) -> None:
    from concurrent.futures import ThreadPoolExecutor

    job.write(make_texts(10))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(job.enrich).result()
    job.check()


def test_the_sample_takes_four_calls_and_a_quarter_of_a_dense_answers_tokens(job: Job) -> None:
    import example_usage

    module.enrich_dataset(
        ROOT / "HatefulData.csv", job.output, "text", "label", example_usage.LABELS, base_url=job.server.url, quiet=True
    )
    dense = '"100":{' + ",".join(f'"{label}":0' for label in example_usage.LABELS) + "}"
    assert len(job.server.calls) == 4
    spent = sum(call.completion_tokens for call in job.server.calls)
    assert spent <= 37 * len(dense) / 4 / 4
