"""Methods: the sheet that an appendix needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import LABELS, Bench, code_sample, make_texts, sample_of

import enrich_dataset as module


class TestMethods:
    def test_the_sheet_has_what_the_record_knows_and_marks_what_its_author_has_to_say(self, bench: Bench) -> None:
        sheet, path = Path(f"{bench.output}.methods.md"), sample_of(bench)
        bench.write([*make_texts(100), "poison-refusal"]).enrich(sample=40, instructions="Be strict.")
        text = sheet.read_text()
        assert "gpt-4o-mini-2024-07-18 (requested as gpt-4o-mini) at 127.0.0.1" in text
        assert (
            "[author: a server of your own: which, and which version of the model?] labelled 100 of 101 texts on"
            in text
        )
        assert ", with these labels: praising_violence, personal_attacks and sexual_harassment." in text
        assert "Rows that have a text and no answer: 1 (1.0%)." in text
        assert "| E.1 | validation by people | [author: none is recorded; say why] |" in text
        assert "To validate" not in text
        assert len(re.findall(r"^\| [A-G]\.\d \| ", text, re.MULTILINE)) == 14
        assert "Be strict." in text
        code_sample(path)
        bench.enrich(gold=path, instructions="Be strict.")
        text = sheet.read_text()
        assert (
            "To validate the labels, 40 of 101 distinct texts were drawn at random, those with rare labels more" in text
        )
        assert re.search(r"\| praising_violence \| 40 \| \d+ \| [\d.]+% \| [\d.]+% \([\d.]+% to [\d.]+%\) \|", text)
        assert "[author: who coded, and how were they trained?]" in text
        assert "null" not in text
        assert "None" not in text
        assert "Shares are not corrected" not in text

    def test_a_sample_of_other_texts_corrects_nothing_and_the_sheet_says_why(self, bench: Bench) -> None:
        bench.write(make_texts(100)).enrich(sample=40)
        code_sample(sample_of(bench))
        bench.write(make_texts(200)).enrich(gold=sample_of(bench))
        text = Path(f"{bench.output}.methods.md").read_text()
        assert (
            "Shares are not corrected, since the texts are others than those from which the sample was drawn." in text
        )
        assert "corrected share" not in text

    def test_labels_from_other_settings_are_counted(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich(instructions="Be strict.")
        bench.enrich()
        text = Path(f"{bench.output}.methods.md").read_text()
        assert "Rows that also have labels from other settings (instructions): 20." in text

    def test_values_of_the_users_stay_in_their_cells(self) -> None:
        assert module.markdown(["a|b", "c"], [["one\ntwo", "|"]]) == "| a\\|b | c |\n| --- | --- |\n| one two | \\| |"

    def test_one_that_its_author_has_edited_is_left_as_it_is(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sheet = Path(f"{bench.output}.methods.md")
        bench.write(make_texts(10)).enrich()
        sheet.write_text("mine")
        assert bench.command() == 0
        assert f"{sheet} was edited, so it is left as it is\n" in capsys.readouterr().out
        assert sheet.read_text() == "mine"
        assert bench.command("--overwrite") == 0
        assert sheet.read_text().startswith("# Methods\n")

    def test_a_prompt_that_was_changed_after_the_draw_is_told(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(60)).enrich(sample=30)
        code_sample(path)
        assert bench.command("--gold", str(path)) == 0
        assert "was changed after the sample was drawn" not in capsys.readouterr().out
        bench.enrich({label: f"what {label} means" for label in LABELS}, gold=path, quiet=False)
        printed = capsys.readouterr().out
        assert (
            "The prompt of praising_violence, personal_attacks and sexual_harassment was changed after the" in printed
        )
        assert "changed after the sample was drawn [author: say why]" in Path(f"{bench.output}.methods.md").read_text()
