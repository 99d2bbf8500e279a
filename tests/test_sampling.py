"""From labels to findings: drawn samples, what people code in them, and corrected shares."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, Job, make_texts
from simulate_shares import SETTINGS, SHARES, simulate

import enrich_dataset as module


def keys_of(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


def labelled(count: int = 5000, seed: int = 1) -> Any:
    dice = np.random.default_rng(seed)
    return dice.random((count, 3)) < [0.3, 0.05, 0.01]


def read_sample(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), delimiter=delimiter))


def truth(text: str) -> list[str]:
    """Another rule than the stand-in's."""
    return [str(int(word in text)) for word in ("violence", "attack", "harass")]


def code(path: Path, count: int | None = None) -> dict[str, list[str]]:
    """Fill in a sample as people do, in the order of the file."""
    rows = read_sample(path)
    for row in rows[:count]:
        row |= dict(zip(LABELS, truth(row["text"]), strict=True))
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return {row["sample_id"]: [row[label] for label in LABELS] for row in rows}


class TestDrawing:
    def test_enlarging_a_sample_keeps_its_texts(self) -> None:
        predicted = labelled()
        for seed in range(60):
            small, _ = module.draw_sample(keys_of(5000), predicted, 300, seed)
            large, _ = module.draw_sample(keys_of(5000), predicted, 500, seed)
            assert len(set(small)) == 300
            assert len(set(large)) == 500
            assert set(small) <= set(large)

    def test_texts_are_drawn_as_often_as_is_stated(self) -> None:
        predicted, draws = labelled(600), 600
        counts = np.zeros(600)
        for seed in range(draws):
            drawn, probabilities = module.draw_sample(keys_of(600), predicted, 100, seed)
            counts[drawn] += 1
        error = np.sqrt(np.maximum(probabilities * (1 - probabilities), 1e-9) / draws)
        assert np.abs(counts / draws - probabilities).mean() < 1.2 * np.sqrt(2 / np.pi) * error.mean()
        assert (np.abs(counts / draws - probabilities) < 5 * error + 0.01).all()
        assert probabilities.sum() == pytest.approx(100)

    def test_rare_labels_get_as_large_a_part_as_common_ones_and_texts_without_any_at_most_half(self) -> None:
        predicted = labelled()
        sizes = module.sampling_sizes(predicted)
        assert sizes.sum() == pytest.approx(1)
        assert sizes[~predicted.any(axis=1)].sum() == pytest.approx(0.5)
        parts = [sizes[predicted[:, column] & (predicted.sum(axis=1) == 1)].sum() for column in range(3)]
        assert max(parts) < 1.7 * min(parts)
        common = np.ones((100, 1), bool)
        common[:10] = False
        assert module.sampling_sizes(common)[:10].sum() == pytest.approx(0.1)

    @pytest.mark.parametrize("count", [1, 5, 10, 20])
    def test_small_populations_are_drawn_whole(self, count: int) -> None:
        drawn, probabilities = module.draw_sample(keys_of(10), np.zeros((10, 2), bool), count, 0)
        assert len(drawn) == min(count, 10)
        assert probabilities.sum() == pytest.approx(min(count, 10))


class TestShares:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_corrected_shares_are_unbiased_and_their_intervals_cover(self, name: str) -> None:
        draws, (recall, precision) = 80, SETTINGS[name]
        figures = simulate(recall, precision, draws)
        slack = 2.6 * (0.95 * 0.05 / draws) ** 0.5  # binomial error, because these are few draws
        assert (figures["covers"] >= 0.92 - slack).all()
        assert (figures["covers"] <= 0.99 + slack).all()
        assert (figures["recall_covers"] >= 0.92 - slack).all()
        assert (abs(figures["corrected"] - figures["true_share"]) < 3.5 * figures["error"]).all()
        if precision < 0.8:
            assert (abs(figures["raw_share"] - figures["true_share"]) > 0.1 * figures["true_share"]).all()
        assert list(figures.index) == list(SHARES)

    def test_with_a_census_the_corrected_share_is_the_true_share(self) -> None:
        dice = np.random.default_rng(3)
        people = pd.DataFrame((dice.random((400, 2)) < [0.3, 0.04]).astype(int), columns=["a", "b"])
        model = people.where(dice.random((400, 2)) < 0.9, 1 - people)
        counts = pd.Series(dice.integers(1, 5, 400))
        table = module.corrected_shares(model, people, ["a", "b"], pd.Series(1.0, index=people.index), counts)
        for label in ("a", "b"):
            assert table.loc[label, "corrected_share"] == pytest.approx(
                np.average(people[label], weights=counts), abs=1e-12
            )
        once = module.corrected_shares(model, people, ["a", "b"], pd.Series(1.0, index=people.index))
        told = module.evaluate_labels(model, people, ["a", "b"]).loc[["a", "b"]]
        for name in ("precision", "recall", "f1", "kappa"):
            np.testing.assert_allclose(once[name].astype(float), told[name].astype(float), rtol=0, atol=1e-12)
            assert (once[f"{name}_low"] < once[name]).all()
            assert (once[name] < once[f"{name}_high"]).all()

    def test_a_group_of_which_nobody_was_coded_gives_no_figure(self) -> None:
        model = pd.DataFrame({"a": [1, 1, 0, 0, 0]})
        gold = pd.DataFrame({"a": [0.0, 1.0]}, index=[2, 3])
        table = module.corrected_shares(model, gold, ["a"], pd.Series(0.5, index=[2, 3]))
        assert table.loc["a", "coded"] == 2
        assert table.loc["a", ["corrected_share", "corrected_share_low", "precision", "recall"]].isna().all()
        assert table.loc["a", "raw_share"] == 0.4

    def test_a_label_that_was_never_predicted_is_corrected_by_what_was_missed(self) -> None:
        model = pd.DataFrame({"a": [0] * 100})
        gold = pd.DataFrame({"a": [1] * 5 + [0] * 45})
        table = module.corrected_shares(model, gold, ["a"], pd.Series(0.5, index=gold.index))
        assert table.loc["a", "corrected_share"] == pytest.approx(0.1)
        assert table.loc["a", "corrected_share_low"] < 0.1 < table.loc["a", "corrected_share_high"]
        assert table.loc["a", "recall"] == 0
        assert np.isnan(table.loc["a", "precision"])

    def test_blanks_are_not_coded_and_strangers_are_refused(self) -> None:
        model, gold = pd.DataFrame({"a": [1, 0]}), pd.DataFrame({"a": [1.0, None]})
        assert module.corrected_shares(model, gold, ["a"], pd.Series([1.0, 1.0])).loc["a", "coded"] == 1
        with pytest.raises(module.InputError, match=r"must be one of `predicted`"):
            module.corrected_shares(model, gold.set_axis([0, 7]), ["a"], pd.Series(1.0, index=[0, 7]))


class TestCommand:
    def test_sample_code_compare_and_enlarge(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write([*make_texts(1000), *make_texts(50)])
        assert job.command("--sample", "60", "--label-column", "id") == 0
        assert f"✓ Sample: 60 of 1050 distinct texts that the model labelled, in {path}\n" in capsys.readouterr().out
        path.unlink()
        assert job.command("--sample", "60") == 0
        assert "✓ Sample: 60 of 1000 distinct texts" in capsys.readouterr().out
        rows = read_sample(path)
        assert list(rows[0]) == ["sample_id", "text", *LABELS, "inclusion_probability"]
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")
        assert {row[label] for row in rows for label in LABELS} == {""}
        assert all(re.fullmatch("t[0-9a-f]{32}", row["sample_id"]) for row in rows)
        coded = code(path, 50)
        calls = len(job.server.calls)
        assert job.command("--gold", str(path)) == 0
        printed = capsys.readouterr().out
        assert len(job.server.calls) == calls
        assert "=== Shares, corrected by what people coded, with 95 % intervals ===\n" in printed
        table = printed.partition("=== Shares, corrected")[2].splitlines()
        assert table[1].split() == ["coded", "raw", "corrected"]
        assert table[2].split()[:2] == ["praising_violence", "50"]
        record = json.loads(Path(f"{job.output}.run.json").read_text())["corrected_shares"][LABELS[0]]
        right = np.mean([truth(text)[0] == "1" for text in job.texts])
        assert record["corrected_share_low"] <= right <= record["corrected_share_high"]
        assert job.command("--sample", "100", "--gold", str(path)) == 0
        after = {row["sample_id"]: [row[label] for label in LABELS] for row in read_sample(path)}
        assert len(after) == 100
        assert {name: cells for name, cells in after.items() if name in coded} == coded
        probabilities = {row["sample_id"]: float(row["inclusion_probability"]) for row in read_sample(path)}
        assert all(probabilities[row["sample_id"]] > float(row["inclusion_probability"]) for row in rows)

    def test_a_sample_that_went_through_a_spreadsheet_is_understood(self, job: Job) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write([f"{text}; with ünï" for text in make_texts(300)]).enrich(sample=40)
        code(path)
        direct = job.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        rows = read_sample(path)
        random.Random(1).shuffle(rows)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0].keys(), delimiter=";", lineterminator="\r\n")
        writer.writeheader()
        for row in rows:
            comma = {"inclusion_probability": row["inclusion_probability"].replace(".", ",")}
            writer.writerow(row | comma | {LABELS[0]: f"{row[LABELS[0]]},0"})
        path.write_bytes(text.getvalue().encode("cp1252"))
        told = job.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        assert told == {label: pytest.approx(figures, nan_ok=True) for label, figures in direct.items()}
        job.enrich(sample=50)
        assert sum(row[LABELS[1]] != "" for row in read_sample(path)) == 40

    def test_semicolons_stay_semicolons(self, job: Job) -> None:
        job.input.write_text("id;text\n1;cake\n2;violence\n")
        job.enrich(sample=2)
        assert len(read_sample(Path(f"{job.output}.sample.csv"), ";")[0]) == 6

    def test_cells_that_were_given_and_blank_rows_are_no_part_of_it(
        self, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job.input.write_text(f"text,{LABELS[0]}\nviolence,0\ntram,\ncake,\n,\npoison-refusal,\n")
        job.enrich(sample=10, quiet=False, examples=pd.DataFrame([["cake", 0, 0, 0]], columns=["text", *LABELS]))
        assert "✓ Sample: 1 of 1 distinct texts" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("sample_id,text\n", "The column 'inclusion_probability' is not in the header"),
            (f"sample_id,{','.join(LABELS)},inclusion_probability\n12,1,0,0,0.5\n", "Row 0 of the sample"),
            (f"sample_id,{','.join(LABELS)},inclusion_probability\nt{'0' * 32},1,0,0,5\n", "Row 0 of the sample"),
            (
                f"sample_id,{','.join(LABELS)},inclusion_probability\nt{'0' * 32},maybe,0,0,1\n",
                "holds 'maybe', not 1, 0",
            ),
            ((f"sample_id,{','.join(LABELS)},inclusion_probability\n" + f"t{'0' * 32},1,0,0,1\n" * 2), "twice"),
        ],
    )
    def test_one_that_cannot_be_understood_is_refused_and_left_alone(
        self, job: Job, content: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(f"{job.output}.sample.csv")
        path.write_text(content)
        assert job.write(make_texts(10)).command("--sample", "5") == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1
        assert path.read_text() == content
        assert job.server.calls == []

    @pytest.mark.parametrize("change", ["labels", "seed"])
    def test_when_the_predictions_have_changed_it_is_left_alone(
        self, job: Job, change: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write(make_texts(100)).enrich(sample=20)
        code(path)
        before = path.read_bytes()
        if change == "labels":
            job.write(make_texts(120))
        assert job.command("--sample", "30", *(["--seed", "2"] if change == "seed" else [])) == 0
        assert (
            f"The labels have changed since {path} was drawn, so it was not changed; move or delete it"
            in capsys.readouterr().out
        )
        assert path.read_bytes() == before

    def test_what_nobody_has_coded_and_what_is_of_another_draw_is_told(
        self, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write(make_texts(100)).enrich(sample=20)
        assert job.command("--gold", str(path)) == 2
        told = "No 1 or 0 is filled in in the sample that is passed as --gold: have people code some rows."
        assert told in capsys.readouterr().err
        code(path)
        job.enrich(sample=30)
        assert job.command("--gold", str(path)) == 0
        assert "Gold rows that are not coded: 10\n" in capsys.readouterr().out
        assert job.command("--gold", str(path), "--label-column", "id") == 0
        printed = capsys.readouterr().out
        assert "Gold rows that are not in the table: 30\n" in printed
        assert "A sample's rows are found only with the --label-column with which it was drawn\n" in printed

    @pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
    def test_one_that_was_saved_in_another_encoding_is_a_sample_still(
        self, job: Job, encoding: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write(make_texts(100)).enrich(sample=20)
        code(path)
        path.write_bytes(path.read_bytes().decode("utf-8-sig").encode(encoding))
        assert job.command("--gold", str(path)) == 0
        assert "=== Shares, corrected by what people coded, with 95 % intervals ===" in capsys.readouterr().out

    def test_a_coded_one_and_a_table_without_rows(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write(make_texts(100)).enrich(sample=20)
        code(path)
        assert job.write([]).command("--gold", str(path)) == 0
        assert "Gold rows that are not in the table: 20\n" in capsys.readouterr().out

    def test_it_grows_in_another_folder_too(self, job: Job, tmp_path: Path) -> None:
        job.write(make_texts(100)).enrich(sample=20)
        code(Path(f"{job.output}.sample.csv"))
        moved = tmp_path / "moved"
        moved.mkdir()
        for path in [each for each in tmp_path.iterdir() if each.is_file()]:
            path.rename(moved / path.name)
        again = Job(moved, job.server)
        again.enrich(sample=30)
        with Path(f"{again.output}.sample.csv").open(encoding="utf-8-sig", newline="") as file:
            assert len(list(csv.DictReader(file))) == 30

    def test_the_plot_shows_corrected_shares_too(self, job: Job) -> None:
        path, plot = Path(f"{job.output}.sample.csv"), job.output.with_suffix(".svg")
        job.write(make_texts(200)).enrich(sample=50)
        code(path)
        job.enrich(gold=path, plot=plot)
        frame = pd.DataFrame({label: [0, 1] for label in LABELS})
        shares = pd.DataFrame(
            {"corrected_share": 0.5, "corrected_share_low": 0.4, "corrected_share_high": 0.6}, index=LABELS[:2]
        )
        figure = module.plot_labels(frame, LABELS, corrected=shares.to_dict("index"))
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
            "all rows (n=2)",
            "corrected by people",
        ]
        assert b"<svg" in plot.read_bytes()

    def test_a_frame_has_no_file_to_fill_in(self) -> None:
        with pytest.raises(module.InputError, match="sample writes a file beside the output"):
            module.enrich_dataframe(pd.DataFrame({"text": ["a"]}), "text", ["x"], sample=5)


class TestForms:
    @pytest.mark.parametrize("form", ["list", "each"])
    @pytest.mark.parametrize("live", [True, False])
    def test_cells_are_right_under_both_forms_of_all_labels(self, job: Job, form: str, live: bool) -> None:
        job.server.faults = {"missing": 0.05, "doubled": 0.05, "unknown": 0.05, "length": 0.05, "foreign": 0.05}
        options: dict[str, Any] = {} if live else {"use_batch_api": True, "poll_interval": 0.05}
        job.write(make_texts(95)).enrich(answer_form=form, **options)
        blank = [number for number, cells in enumerate(job.cells) if "" in cells]
        assert len(blank) <= 3  # which met a fault whenever they were asked
        job.check(blank_rows=blank)
        job.server.faults = {}
        job.enrich(answer_form=form)
        job.check()
        calls = len(job.server.calls)
        job.enrich(answer_form=form)
        assert len(job.server.calls) == calls

    def test_one_label_is_chosen_from_the_whole_set(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        job.server.faults = {"missing": 0.1, "unknown": 0.1}
        job.write([*make_texts(60), "poison-400-filter"]).enrich(answer_form="one")
        assert {sum(map(int, cells)) for cells in job.cells[:-1]} == {1}
        assert job.cells[-1] == [""] * 3
        assert {call.labels for call in job.server.calls} == {tuple(LABELS)}
        assert '"$defs": {"a": {"type": "string", "enum"' in json.dumps(job.server.calls[0].body)
        job.server.faults = {}
        calls = len(job.server.calls)
        job.enrich([*LABELS, "weather"], answer_form="one", quiet=False)
        assert "60 stored answers do not count: they are from another prompt; " in capsys.readouterr().out
        assert sum(len(call.texts) for call in job.server.calls[calls:] if call.status == 200) == 60

    def test_another_form_is_another_question(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        job.write(make_texts(20)).enrich()
        job.enrich(answer_form="each", quiet=False)
        assert "20 stored answers do not count: they are from another prompt; " in capsys.readouterr().out
        job.check()
        assert len(job.asked) == 40

    @pytest.mark.parametrize("form", ["list", "each", "one"])
    @pytest.mark.parametrize("refused", [set(), {"json_schema"}, {"json_schema", "json_object"}])
    def test_servers_without_schemas_are_asked_in_words(self, job: Job, form: str, refused: set[str]) -> None:
        job.server.refuses = refused
        job.write(make_texts(20)).enrich(answer_form=form)
        assert all("" not in cells for cells in job.cells)

    @pytest.mark.parametrize("form", ["list", "each", "one"])
    def test_the_audit_is_asked_the_careful_way_and_differs_where_packing_does_harm(self, job: Job, form: str) -> None:
        job.server.flips = 0.2
        told = job.write(make_texts(200)).enrich(answer_form=form, audit=100).attrs["enrichment"]["audit"]
        audits = [call.body for call in job.server.calls if len(call.texts) == 1]
        assert len(audits) == 100
        kind = {"list": "object", "each": "object", "one": "string"}[form]
        assert {body["response_format"]["json_schema"]["schema"]["$defs"]["a"]["type"] for body in audits} == {kind}
        assert any(figures["agreement"] < 0.95 for figures in told.values())
        assert any(figures["share"] != figures["share_audited"] for figures in told.values())
        calls = len(job.server.calls)
        job.enrich(answer_form=form, batch_size=1)
        assert len(job.server.calls) == calls

    def test_an_audits_answers_never_stand_for_labels_whatever_form_these_have(self, job: Job) -> None:
        job.write(make_texts(20)).enrich(audit=20)
        calls = len(job.server.calls)
        job.enrich(answer_form="each", batch_size=1)
        assert len(job.server.calls) == calls + 20

    def test_examples_have_the_answers_form(self, job: Job) -> None:
        examples = pd.DataFrame([["praise", 1, 0, 0], ["a person", 0, 1, 0]], columns=["text", *LABELS])
        for form, answer in (
            ("each", '"638":{"praising_violence":1,"personal_attacks":0,"sexual_harassment":0}'),
            ("one", '{"638":"praising_violence","127":"personal_attacks"}'),
        ):
            job.write(["cake"]).enrich(examples=examples, answer_form=form)
            assert answer in job.server.calls[-1].body["messages"][0]["content"]
        examples.loc[0, LABELS[1]] = 1
        with pytest.raises(module.InputError, match="has 2 labels: with answer_form one, an example has exactly one"):
            job.enrich(examples=examples, answer_form="one")
